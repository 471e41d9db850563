"""Files of what was trained, without the model it was trained on.

A folder holds ``model.safetensors`` (every parameter that requires gradients, under its name in
``state_dict``, and embeddings and head if they were resized), ``config.json`` (of the whole model,
with a note that names its base model) and, where peft has a format for it, the same as an adapter
of peft: a LoRA inside the blocks, or prompts before the input. Knows neither the network nor how a
model is loaded.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from petals.client.config import ClientConfig
from petals.client.tuning.lora import RemoteModel, load_adapter, save_adapter
from petals.client.tuning.prompts import DEEP_PROMPTS, PROMPTS, TuningConfig
from petals.client.tuning.whole_modules import resized_parameters
from petals.errors import ConfigError, ModelFilesBroken

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_NOTE = "petals_tuned"
"""Key of the note in ``config.json``."""
_OF_THE_HEAD = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Settings of a classifier that its base model's config does not have."""
_OF_THE_BASE = ("revision", "subfolder", "variant")
"""Fields of HubAccess that say which files the base model was loaded from."""


@dataclass(frozen=True, slots=True)
class SavedTuning:
    """A folder of ``save_pretrained``. base, options: arguments of ``from_pretrained``.

    num_tokens: rows of the embeddings; 0: those of the base. frozen: the saved parameters that were
    not trained.
    """

    folder: Path
    base: str
    model_class: str
    has_lora: bool
    options: dict[str, Any]
    num_tokens: int = 0
    frozen: frozenset[str] = frozenset()

    @torch.no_grad()
    def restore(self, model: RemoteModel) -> None:
        """Copy the trained tensors into the model, resized if it was; they require gradients again.

        Raises ModelFilesBroken for a damaged file and for the file of another model, AdapterRefused
        for an adapter of another model.
        """
        try:
            tensors = load_file(self.folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ModelFilesBroken(
                f"{self.folder / WEIGHTS_FILE} cannot be read: {error}"
            ) from error
        if self.num_tokens and self.num_tokens != model.num_base_tokens:
            model.resize_token_embeddings(self.num_tokens, mean_resizing=False)
        if self.has_lora:
            load_adapter(model, self.folder, is_trainable=any(".lora_A" in n for n in tensors))
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                shape = "no such parameter" if parameter is None else list(parameter.shape)
                raise ModelFilesBroken(
                    f"{self.folder} holds {name} {list(tensor.shape)}, and "
                    f"{type(model).__name__} has {shape}.",
                    hint=f"It was saved by a {self.model_class}; load it as one, on its own base.",
                )
            parameter.copy_(tensor)
            parameter.requires_grad_(name not in self.frozen)


def find_tuned(source: str, options: dict[str, Any] | None = None) -> SavedTuning | None:
    """What ``save_pretrained`` wrote into the folder ``source``; None for any other source.

    ``options`` of ``from_pretrained``: a ``subfolder`` that holds it is removed from them. Raises
    ModelFilesBroken for a damaged note.
    """
    options = {} if options is None else options
    subfolder = options.get("subfolder")
    if subfolder and (found := find_tuned(str(Path(source) / subfolder))):
        del options["subfolder"]
        return found
    folder = Path(source)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    note = config.get(_NOTE) if isinstance(config, dict) else None
    if note is None:
        return None
    try:
        options = {name: config[name] for name in _OF_THE_HEAD if config.get(name) is not None}
        if "id2label" in options:  # keys are strings in JSON
            options["id2label"] = {int(key): label for key, label in options["id2label"].items()}
        options |= {entry.name: config[entry.name] for entry in fields(TuningConfig)}
        options |= {name: str(value) for name, value in note.get("access", {}).items()}
        base, model_class, has_lora = str(note["base"]), str(note["class"]), bool(note["lora"])
        num_tokens, frozen = int(note.get("tokens", 0)), frozenset(note.get("frozen", ()))
        return SavedTuning(folder, base, model_class, has_lora, options, num_tokens, frozen)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelFilesBroken(
            f"{folder / CONFIG_FILE} was not written by save_pretrained: {_NOTE} or a setting "
            f"of it is damaged ({error!r}).",
            hint="Copy the folder again from where it was saved.",
        ) from error


def save_tuned(model: RemoteModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the parameters that require gradients, with the values of ``state`` where it has them.

    Embeddings and head that were resized are written in any case. Raises ConfigError if there is
    nothing to write.
    """
    resized = resized_parameters(model)
    trained = {
        name: (state or {}).get(name, parameter).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in resized
    }
    if not trained:
        raise ConfigError(
            "Nothing of this model is trained here, so there is nothing to save.",
            hint="Load it with tuning_mode and pre_seq_len, or unfreeze what you train with "
            "requires_grad_(). The model itself is where it was loaded from: "
            f"{model.config._name_or_path}.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, _config_of(model))
    for name in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)  # of an earlier call
    prompts = _as_peft(trained)
    if model.remote_blocks.lora is not None:
        save_adapter(model, folder)
    elif prompts is not None:
        save_file(prompts, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
        _write_json(folder / ADAPTER_CONFIG_FILE, _peft_config(model))


def _config_of(model: RemoteModel) -> dict[str, Any]:
    """The model's config without the client's settings, which belong to this machine and swarm."""
    config = copy.deepcopy(model.config)
    for entry in fields(ClientConfig):
        if hasattr(config, entry.name):
            delattr(config, entry.name)
    original = type(model).__name__.removeprefix("Distributed")
    config.architectures = [original]
    access = {name: getattr(model.base_access, name) for name in _OF_THE_BASE}
    note = {
        "base": model.config._name_or_path,
        "access": {name: value for name, value in access.items() if value},
        "class": type(model).__name__,
        "lora": model.remote_blocks.lora is not None,
        "tokens": len(model.get_input_embeddings().get_parameter("weight")),
        "frozen": [name for name, p in resized_parameters(model).items() if not p.requires_grad],
    }
    return json.loads(config.to_json_string(use_diff=False)) | {_NOTE: note}


def _as_peft(trained: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a prompt-tuning adapter of peft; None if its format has no place for one."""
    found: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        if name.endswith(f"{PROMPTS}.weight") and DEEP_PROMPTS not in name:
            found[PROMPTS] = tensor.clone()
        elif name == "score.weight":
            found["base_model.score.weight"] = tensor.clone()
        else:
            return None
    return found if PROMPTS in found else None


def _peft_config(model: RemoteModel) -> dict[str, Any]:
    text = model.config.get_text_config(decoder=True)
    prompts = model.blocks_host._modules[PROMPTS]
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        "base_model_name_or_path": model.config._name_or_path,
        "num_virtual_tokens": prompts.num_embeddings,
        "token_dim": prompts.embedding_dim,
        "num_transformer_submodules": 1,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "inference_mode": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
