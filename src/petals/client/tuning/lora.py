"""LoRA inside remote blocks: its matrices are ordinary parameters of the client's model.

Their values are sent to the servers with each pass and session; gradients come back, and the
optimizer runs at the client. Reads and writes peft's format. Knows no servers and no routes.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.client.load_options import adapter_access
from petals.client.tuning import whole_modules
from petals.client.tuning.whole_modules import WholeModules
from petals.errors import AdapterRefused
from petals.models.adapters.config import LoraConfig
from petals.models.adapters.files import SavedAdapter, read_adapter, targeted_slots, write_adapter
from petals.models.adapters.low_rank import Adapter, LowRank, Slot, Slots, check_finite, check_fits
from petals.models.checkpoint.arch import describe
from petals.models.checkpoint.hub import HubAccess
from petals.models.runtime.lora_hooks import slots_of_model

_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
DEFAULT_NAME = "default"
"""peft's name of an adapter that the caller does not name."""
_SHOWN_NAMES = 12
"""Most names of matrices in an error message."""


class RemoteLora(nn.Module):
    """The matrices of one adapter, as f32 parameters ``BLOCK.PATH.lora_A`` and ``lora_B``.

    whole: modules outside the blocks that belong to the adapter; None: there are none. name: the
    caller's name for it.
    """

    whole: WholeModules | None = None
    name = DEFAULT_NAME

    def __init__(self, config: LoraConfig, adapter: Adapter, *, is_trainable: bool = True) -> None:
        super().__init__()
        self.config = config
        self._slots: dict[Slot, float] = {}
        for (block, path), part in adapter.parts.items():
            pair = nn.Module()
            for name, tensor in (("lora_A", part.a), ("lora_B", part.b)):
                values = tensor.detach().to(torch.float32, copy=True)
                pair.register_parameter(name, nn.Parameter(values, requires_grad=is_trainable))
            _put(self, f"{block}.{path}", pair)
            self._slots[block, path] = part.scaling
        if is_trainable and config.lora_dropout:
            warnings.warn(
                "lora_dropout has no effect inside remote blocks: servers apply no dropout.",
                stacklevel=3,
            )

    @classmethod
    def new(cls, config: LoraConfig, slots: Slots, blocks_path: str) -> "RemoteLora":
        """New matrices, A random and B zero, for the ``slots`` that the config names.

        blocks_path: where the model keeps its layers. Raises AdapterRefused if none is named.
        """
        wanted = targeted_slots(config, slots, blocks_path)
        if not wanted:
            names = sorted({path for _, path in slots})
            raise AdapterRefused(
                f"No matrix of the blocks is named by target_modules={config.target_modules!r}.",
                hint=f"They have {', '.join(names[:_SHOWN_NAMES])}; experts take no adapter.",
            )
        parts = {}
        for slot, path in wanted.items():
            (num_in, num_out), rank = slots[slot], config.rank(path)
            a = nn.init.kaiming_uniform_(torch.empty(rank, num_in), a=math.sqrt(5))
            parts[slot] = LowRank(a, torch.zeros(num_out, rank), config.scaling(path))
        return cls(config, Adapter(parts))

    def live(self) -> Adapter:
        """The adapter made of the parameters themselves, for a pass that may be differentiated."""
        parts: dict[Slot, LowRank] = {}
        for (block, path), scaling in self._slots.items():
            pair = self.get_submodule(f"{block}.{path}")
            a, b = pair.get_parameter("lora_A"), pair.get_parameter("lora_B")
            parts[block, path] = LowRank(a, b, scaling)
        return Adapter(parts)

    def snapshot(self) -> Adapter:
        """A copy that later training does not change, for sessions and files."""
        return self.live().mapped(lambda tensor: tensor.detach().clone())

    def extra_repr(self) -> str:
        ranks = sorted({part.rank for part in self.live().parts.values()})
        return f"{len(self._slots)} matrices, rank {', '.join(map(str, ranks))}"


class AdaptedBlocks(Protocol):
    """Remote blocks that take one adapter."""

    config: PretrainedConfig
    lora: RemoteLora | None


class RemoteModel(whole_modules.Model, Protocol):
    """What tuning needs of a model with remote blocks.

    The functions below are methods of such a model, in place of those that transformers has for
    peft. It has at most one adapter; calls and sessions that begin after the adapter was added use
    it.
    """

    config: PretrainedConfig
    blocks_path: str
    base_access: HubAccess

    @property
    def remote_blocks(self) -> AdaptedBlocks: ...

    @property
    def blocks_host(self) -> PreTrainedModel: ...

    def can_generate(self) -> bool: ...

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module: ...


def add_adapter(
    model: RemoteModel, adapter_config: object, adapter_name: str | None = None
) -> None:
    """Add a new trainable adapter in place of the present one. adapter_config: a LoraConfig, of
    petals or of peft.

    Its matrices are among ``model.parameters()`` from now on. The modules of ``modules_to_save`` (a
    score head, embeddings) get copies of their parameters, which are trained; ``delete_adapter``
    puts the originals back. Raises AdapterRefused for what servers cannot apply.
    """
    config = LoraConfig.of(adapter_config)
    slots, transposed = slots_of_model(model.remote_blocks.config)
    config = replace(config, fan_in_fan_out=transposed)
    lora = RemoteLora.new(config, slots, model.blocks_path)
    whole_modules.parameters_of(model, config.modules_to_save)
    delete_adapter(model)
    values = whole_modules.parameters_of(model, config.modules_to_save)
    lora.whole = WholeModules(
        model, values, is_trainable=True, ties_weights=config.ensure_weight_tying
    )
    lora.name = adapter_name or DEFAULT_NAME
    model.remote_blocks.lora = lora


def load_adapter(
    model: RemoteModel,
    peft_model_id: str | Path,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
    **options: Any,
) -> None:
    """Use an adapter that peft or ``save_adapter`` has written: a folder or a repository.

    ``options``: ``revision``, ``token``, ``cache_dir``, ``subfolder``, ``local_files_only``,
    ``force_download``; others of transformers' ``load_adapter`` are accepted if they ask for
    nothing. The adapter is sent to the servers of this client's sessions and passes only. Raises
    ModelNotFound, ConfigError, AdapterRefused (pickle, another kind, another model).
    """
    access = adapter_access(options)
    layers_path = describe(model.remote_blocks.config).layers_path
    saved = read_adapter(str(peft_model_id), layers_path, None, access)
    slots, _ = slots_of_model(model.remote_blocks.config)
    check_fits(saved.adapter, slots)
    check_finite(saved.adapter)
    whole_modules.check_fits(model, saved.rest)
    lora = RemoteLora(saved.config, saved.adapter, is_trainable=is_trainable)
    delete_adapter(model)
    lora.whole = WholeModules(
        model,
        saved.rest,
        is_trainable=is_trainable,
        ties_weights=saved.config.ensure_weight_tying,
    )
    lora.name = adapter_name or DEFAULT_NAME
    model.remote_blocks.lora = lora


def delete_adapter(model: RemoteModel, adapter_names: str | list[str] | None = None) -> None:
    """Go on without the adapter, with the model's own embeddings and head.

    Raises AdapterRefused if these were resized while the adapter was there, and for a name that
    is not the adapter's.
    """
    if adapter_names is not None:
        set_adapter(model, adapter_names)
    lora = model.remote_blocks.lora
    if lora is not None and lora.whole is not None:
        lora.whole.restore(model)
    model.remote_blocks.lora = None


def active_adapters(model: RemoteModel) -> list[str]:
    """The name of the adapter; empty if there is none."""
    lora = model.remote_blocks.lora
    return [] if lora is None else [lora.name]


def set_adapter(model: RemoteModel, adapter_name: str | list[str]) -> None:
    """Accepts the name of the one adapter. Raises AdapterRefused for any other."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    present = active_adapters(model)
    if names != present:
        raise AdapterRefused(
            f"The model has {'the adapter ' + present[0] if present else 'no adapter'}, "
            f"not {', '.join(names)}.",
            hint="A model has one adapter at a time; load_adapter(FOLDER) takes the other one.",
        )


def not_with_remote_blocks(name: str, instead: str) -> Callable[..., Any]:
    """A method in place of transformers' method ``name``. Raises AdapterRefused."""

    def refuse(model: RemoteModel, *args: object, **kwargs: object) -> None:
        raise AdapterRefused(
            f"{name}: the matrices of an adapter for remote blocks are not layers of this process.",
            hint=instead,
        )

    return refuse


def save_adapter(model: RemoteModel, save_directory: str | Path) -> None:
    """Write the adapter as peft does, with the whole modules that were trained with it, and with
    embeddings and head if they were resized.

    Raises AdapterRefused if there is none.
    """
    lora = model.remote_blocks.lora
    if lora is None:
        raise AdapterRefused(
            "The model has no adapter to save.", hint="Add one: model.add_adapter(config)."
        )
    whole = whole_modules.resized_parameters(model)
    whole |= {} if lora.whole is None else lora.whole.of(model)
    saved = SavedAdapter(lora.config, lora.snapshot(), whole)
    kind = type(model).__name__
    settings = {
        "task_type": next((task for end, task in _TASKS.items() if kind.endswith(end)), None),
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None),
    }
    write_adapter(Path(save_directory), saved, model.blocks_path, settings)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` at ``path``, with an empty module for each part of the path before."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)
