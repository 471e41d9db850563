"""Blocks are found in any decoder, and what has none says why."""

import pytest
from transformers import CONFIG_MAPPING

from petals.errors import ModelNotSupported
from petals.models.checkpoint.arch import describe
from petals.models.verify.tiny import NUM_BLOCKS, VOCAB_SIZE, tiny_config


@pytest.mark.parametrize(
    ("model_type", "host_path", "layers_path"),
    [
        ("llama", "", "layers"),
        ("bloom", "", "h"),
        ("gpt2", "", "h"),
        ("gpt_neox", "", "layers"),
        ("mpt", "", "blocks"),
        ("opt", "decoder", "decoder.layers"),
        ("gemma3", "language_model", "language_model.layers"),
        ("llama4", "language_model.model", "language_model.model.layers"),
        ("qwen3_next", "", "layers"),
    ],
)
def test_finds_the_blocks(model_type: str, host_path: str, layers_path: str) -> None:
    arch = describe(tiny_config(model_type))
    assert (arch.host_path, arch.layers_path) == (host_path, layers_path)
    assert (arch.num_blocks, arch.hidden_size, arch.vocab_size) == (NUM_BLOCKS, 32, VOCAB_SIZE)


def test_takes_the_layers_and_not_a_list_of_equal_length() -> None:
    # As many experts as layers: each block then holds a list of the same length as the block list.
    arch = describe(tiny_config("mixtral", num_local_experts=NUM_BLOCKS))
    assert arch.layers_path == "layers"


def test_leaves_the_config_alone() -> None:
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    before = config.to_dict()
    describe(config)
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bert", "bidirectional"),
        ("rwkv", "recurrent state"),
        ("vit", "no causal language model"),
        ("gemma3n", "per-layer embeddings"),
    ],
)
def test_says_why_not(model_type: str, reason: str) -> None:
    with pytest.raises(ModelNotSupported, match=reason) as caught:
        describe(CONFIG_MAPPING[model_type]())
    assert "models check" in caught.value.hint


def test_blocks_that_share_keys_are_refused() -> None:
    with pytest.raises(ModelNotSupported, match="keys and values of earlier blocks"):
        describe(tiny_config("gemma4_text", num_kv_shared_layers=2))
