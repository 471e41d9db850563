"""A chain of spans is the whole model, bit by bit, and a span holds nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from petals.errors import BlocksNotServed, ModelFilesBroken
from petals.models.checkpoint.arch import ModelArch, describe
from petals.models.loading.head import base_within
from petals.models.loading.split import LoadedBlocks, LoadOptions, load_blocks
from petals.models.verify.tiny import NUM_BLOCKS
from petals.testing.tiny_models import PUBLISHED
from petals.types import BlockSpan
from support.models import WriteModel

CUTS = (BlockSpan(0, 1), BlockSpan(1, 4), BlockSpan(4, NUM_BLOCKS))
CHECKPOINTS = [
    ("llama", False),
    ("bloom", False),
    ("bloom", True),
    ("mixtral", True),
    ("deepseek_v3", True),
    ("gemma3", False),
    ("llama4", False),
    ("falcon", False),
    ("gpt2", False),
    ("opt", False),
    ("gpt_oss", False),
    ("qwen3_next", False),
]


def first_output(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def whole_model(folder: Path, arch: ModelArch) -> nn.Module:
    multimodal = arch.model_type in ("gemma3", "llama4")
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
    return base_within(model, arch)


def border_states(base: nn.Module, arch: ModelArch, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states before block 0, between blocks, and after the last."""
    layers = base.get_submodule(arch.layers_path)
    states: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    for layer in layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(
        lambda module, args, output: states.append(first_output(output))
    )
    base.get_submodule(arch.host_path)(input_ids=ids, use_cache=False)
    return states


def run_span(loaded: LoadedBlocks, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own forward with ``hidden`` put in before the first local block."""
    captured: list[torch.Tensor] = []

    def inject(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    hooks = [
        loaded.layers[0].register_forward_pre_hook(inject, with_kwargs=True),
        loaded.layers[-1].register_forward_hook(
            lambda module, args, output: captured.append(first_output(output))
        ),
    ]
    loaded.base(inputs_embeds=hidden, use_cache=False)
    for hook in hooks:
        hook.remove()
    return captured[0]


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "published"), CHECKPOINTS)
def test_spans_are_the_whole_model(
    model_type: str, published: bool, tiny_folder: WriteModel
) -> None:
    folder = tiny_folder(model_type, PUBLISHED[model_type] if published else None)
    loaded = [load_blocks(str(folder), span) for span in CUTS]
    arch = loaded[0].arch
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(1))
    states = border_states(whole_model(folder, arch), arch, ids)
    hidden = states[0]
    for part in loaded:
        hidden = run_span(part, hidden)
        assert torch.equal(hidden, states[part.blocks.end])


def test_a_span_holds_nothing_else(tiny_folder: WriteModel) -> None:
    loaded = load_blocks(str(tiny_folder("gemma3")), BlockSpan(1, 3))
    inside = sum(p.numel() for p in loaded.layers.parameters())
    assert sum(p.numel() for p in loaded.base.parameters()) == inside
    assert len(loaded.layers) == 2
    assert loaded.config.num_hidden_layers == NUM_BLOCKS
    assert loaded.base.config.num_hidden_layers == 2
    assert loaded.base.config.layer_types == loaded.config.layer_types[1:3]


def test_blocks_are_numbered_from_zero_frozen_and_in_eval_mode(tiny_folder: WriteModel) -> None:
    loaded = load_blocks(str(tiny_folder("bloom")), BlockSpan(3, 5))
    assert [layer.self_attention.layer_idx for layer in loaded.layers] == [0, 1]
    assert not any(p.requires_grad for p in loaded.base.parameters())
    assert not any(module.training for module in loaded.base.modules())


def test_the_dtype_is_chosen(tiny_folder: WriteModel) -> None:
    options = LoadOptions(dtype=torch.bfloat16)
    loaded = load_blocks(str(tiny_folder("llama")), BlockSpan(0, 1), options)
    assert loaded.dtype is torch.bfloat16
    assert {p.dtype for p in loaded.layers.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("span", [BlockSpan(0, 6), BlockSpan(5, 5), BlockSpan(7, 9)], ids=str)
def test_blocks_the_model_does_not_have(span: BlockSpan, tiny_folder: WriteModel) -> None:
    with pytest.raises(BlocksNotServed, match="0:5"):
        load_blocks(str(tiny_folder("llama")), span)


@pytest.mark.parametrize(
    ("model_type", "dropped", "settings", "span", "reason"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight", {}, (2, 3), "lacks 1 needed"),
        ("llama", "model.layers.2.input_layernorm.weight", {}, (2, 3), "lacks 1 needed"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", {}, (1, 2), None),
        ("llama", "", {"intermediate_size": 64}, (0, 1), "do not fit"),
    ],
    ids=["matrix", "norm", "expert", "another size"],
)
def test_weights_that_are_missing_or_of_another_size_are_fatal(
    model_type: str,
    dropped: str,
    settings: dict,
    span: tuple[int, int],
    reason: str | None,
    edited: WriteModel,
) -> None:
    folder = edited(model_type, {dropped: None}, **settings)
    with pytest.raises(ModelFilesBroken, match=reason):
        load_blocks(str(folder), BlockSpan(*span))
    if not settings:  # the other blocks are whole
        assert load_blocks(str(folder), BlockSpan(3, 5)).blocks == BlockSpan(3, 5)


def test_extra_prediction_layers_are_left_out(edited: WriteModel) -> None:
    # DeepSeek-V3 publishes its multi-token-prediction layer as one block more than the model has.
    extra = {f"model.layers.{NUM_BLOCKS}.eh_proj.weight": torch.ones(2, 2)}
    loaded = load_blocks(str(edited("deepseek_v3", extra)), BlockSpan(3, 5))
    assert describe(loaded.base.config).num_blocks == 2
