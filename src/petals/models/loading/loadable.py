"""Answers, before weights are downloaded, whether a checkpoint's weights can be loaded here.

Reads the config and the names of the tensors. `petals serve`, `petals models plan` and the client's
``from_pretrained`` all ask here, so that they refuse the same checkpoints with the same sentence.
"""

import copy
import re

from transformers import PretrainedConfig, PreTrainedModel

from petals.errors import ConfigError, ModelFilesBroken, ModelNotSupported
from petals.models.checkpoint.arch import ModelArch, describe
from petals.models.checkpoint.skeleton import (
    build_skeleton,
    is_undone,
    method_of,
    quantizer_for,
)
from petals.models.checkpoint.sources import Checkpoint
from petals.models.loading.head import HeadKind, base_within, class_for, drop_towers
from petals.models.loading.quantize import QuantKind
from petals.models.loading.split import pruned_class

_BNB_STATE = re.compile(r"\.(absmax|SCB|quant_state\.\w+)$")
"""Names of the scales that bitsandbytes stores beside a weight."""

_HARMLESS = re.compile(
    r"rot\w*\.(\w*inv_freq|cos_cached|sin_cached)$"
    r"|(attn|attention|self_attention)\.(bias|masked_bias|causal_mask|embed_positions)$"
    r"|(^|\.)(position_ids|alibi|_extra_state)$"
)
"""Tensors that hold no weights: rotary tables, causal masks, positions, and state of the training
program. Older checkpoints contain them, and transformers computes them from the config.
"""


def check_weights(checkpoint: Checkpoint, *, device: str = "cpu") -> None:
    """Check that transformers, on ``device``, reads every tensor of blocks, embeddings and head.

    Raises ModelNotSupported for a quantization that cannot be loaded here, ModelFilesBroken for a
    tensor that no parameter takes (such as the scale of an unknown quantization), and what
    ``Checkpoint.weight_map`` raises.
    """
    arch = describe(checkpoint.config)
    whole = pruned_class(
        _whole_class(checkpoint.config, arch), lambda model: drop_towers(model, arch)
    )
    skeleton = build_skeleton(checkpoint, whole, device)
    taken, unused = skeleton.match(checkpoint.weight_map)
    if method_of(skeleton.quantizer) == "bitsandbytes" and not any(map(_BNB_STATE.search, taken)):
        raise ModelFilesBroken(
            f"The config of {checkpoint.name} calls its weights quantized with bitsandbytes, but "
            "they have no scales.",
            hint="Remove quantization_config from config.json; a server can quantize by itself.",
        )
    owners = _owners(skeleton.model, arch)
    prefix = f"{skeleton.model.base_model_prefix}."
    lost = [
        key
        for key, name in unused.items()
        if not _HARMLESS.search(name)
        and any(_is_below(known, owners) for known in (name, name.removeprefix(prefix)))
    ]
    if lost:
        more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
        raise ModelFilesBroken(
            f"{checkpoint.name} holds {lost[0]}{more}, which transformers would leave unread: "
            "the model would compute with wrong weights.",
            hint="Config and weights belong to different models, or a tool has quantized them in a "
            "format that transformers does not read; use the unquantized model.",
        )


def check_quant(checkpoint: Checkpoint, quant: QuantKind, *, device: str = "cpu") -> None:
    """Raises ConfigError if ``quant`` cannot be applied, since the weights stay quantized already.

    A quantization that transformers undoes while loading (fp8 on CPUs) can be followed by int8.
    """
    if quant is QuantKind.NONE:
        return
    quantizer = quantizer_for(checkpoint, device)
    if quantizer is None:
        return
    if quant is QuantKind.INT8 and is_undone(quantizer):
        return
    raise ConfigError(
        f"The weights of {checkpoint.name} are quantized already ({method_of(quantizer)}), so "
        f"{quant} cannot be applied.",
        hint="Ask for no further quantization: these weights are small already.",
    )


def config_in_memory(checkpoint: Checkpoint, device: str) -> PretrainedConfig:
    """The config, for computing costs: without a quantization that is undone while loading.

    Raises what ``quantizer_for`` raises.
    """
    if not is_undone(quantizer_for(checkpoint, device)):
        return checkpoint.config
    config = copy.deepcopy(checkpoint.config)
    for owner in (config, config.get_text_config(decoder=True)):
        owner.quantization_config = None
    return config


def _whole_class(config: PretrainedConfig, arch: ModelArch) -> type[PreTrainedModel]:
    try:
        return class_for(HeadKind.CAUSAL_LM, config, arch)
    except ModelNotSupported:
        return arch.base_class


def _owners(model: PreTrainedModel, arch: ModelArch) -> set[str]:
    """Paths below which every tensor must be read: the blocks, and the modules with parameters.

    Both with and without the path of the base class: checkpoints have either.
    """
    base = base_within(model, arch)
    base_path = next(path for path, module in model.named_modules() if module is base)
    blocks = [f"{arch.layers_path}.{index}" for index in range(arch.num_blocks)]
    found = set(blocks)
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            found.add(path)
            found.add(path.removeprefix(f"{base_path}."))
    if base_path:
        found.update(f"{base_path}.{path}" for path in blocks)
    return found - {""}


def _is_below(name: str, owners: set[str]) -> bool:
    """Whether a proper prefix of the dotted ``name`` is one of ``owners``."""
    while name:
        name = name.rpartition(".")[0]
        if name in owners:
            return True
    return False
