"""Prices come from the config alone and agree with what really is in memory."""

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from petals.errors import ConfigError
from petals.models.loading.cost import block_costs, client_parameters, plan, split_evenly
from petals.models.loading.head import HeadKind, load_client_part
from petals.models.loading.quantize import QuantKind
from petals.models.loading.split import load_blocks
from petals.models.verify.tiny import tiny_config
from petals.testing.tiny_models import tiny_model
from petals.types import BlockSpan
from support.models import WriteModel

from .test_head import no_layers

BLOOM = CONFIG_MAPPING["bloom"](
    hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880, dtype="bfloat16"
)
LLAMA_405B = CONFIG_MAPPING["llama"](
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)
DEEPSEEK_V3 = CONFIG_MAPPING["deepseek_v3"](dtype="bfloat16")
MIXTRAL = CONFIG_MAPPING["mixtral"](dtype="bfloat16")


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type",
    "llama bloom falcon gpt2 gptj mpt opt phi3 gpt_neox gpt_bigcode mixtral deepseek_v3 gpt_oss "
    "gemma2 gemma3_text gemma4_text qwen3 starcoder2".split(),
)
def test_kv_bytes_are_what_a_cache_holds(model_type: str) -> None:
    num_tokens = 6
    model = tiny_model(tiny_config(model_type))
    cache = DynamicCache()
    model(torch.randint(3, 90, (1, num_tokens)), past_key_values=cache, use_cache=True)
    for cost, layer in zip(block_costs(model.config), cache.layers, strict=True):
        assert cost.kv_bytes(num_tokens) == layer.keys.nbytes + layer.values.nbytes


def test_windows_cap_the_cache() -> None:
    sliding, full = block_costs(tiny_config("gemma3_text"))[1:3]
    assert (sliding.window_tokens, full.window_tokens) == (8, None)
    assert sliding.kv_bytes(1000) == sliding.kv_bytes(8) < full.kv_bytes(1000)


def test_linear_attention_keeps_no_keys() -> None:
    first, _, third = block_costs(tiny_config("qwen3_next"))[:3]
    assert first.kv_bytes(1000) == 0 < third.kv_bytes(1000)


@pytest.mark.parametrize("model_type", ["llama", "bloom", "mixtral", "deepseek_v3", "gemma3"])
def test_weights_are_what_is_loaded(model_type: str, tiny_folder: WriteModel) -> None:
    folder = str(tiny_folder(model_type))
    loaded = load_blocks(folder, BlockSpan(1, 3))
    costs = block_costs(tiny_config(model_type), dtype=torch.float32)[1:3]
    expected = sum(p.nbytes for p in loaded.layers.parameters())
    assert sum(cost.weight_bytes for cost in costs) == expected
    ends = load_client_part(folder, HeadKind.CAUSAL_LM, no_layers)
    assert client_parameters(tiny_config(model_type)) == sum(p.numel() for p in ends.parameters())


def test_bloom_176b() -> None:
    result = plan(BLOOM, 10)
    first = result.servers[0]
    assert first.weight_bytes / 7 == pytest.approx(4.93e9, rel=0.01)
    assert first.kv_bytes_per_1000_tokens == 7 * 2 * 14336 * 2 * 1000
    assert first.outbox_bytes_per_1000_tokens == 14336 * 2 * 1000
    assert result.client_weight_bytes == pytest.approx(2 * 3.6e9, rel=0.01)


def test_llama_405b() -> None:
    costs = block_costs(LLAMA_405B)
    assert len(costs) == 126
    assert costs[0].num_parameters == pytest.approx(3.19e9, rel=0.01)
    assert costs[0].kv_bytes_per_token == 2 * 8 * 128 * 2
    assert client_parameters(LLAMA_405B) == pytest.approx(4.2e9, rel=0.01)


def test_deepseek_v3_caches_the_latent() -> None:
    costs = block_costs(DEEPSEEK_V3)
    assert {cost.kv_bytes_per_token for cost in costs} == {576 * 2}
    assert costs[30].num_parameters == pytest.approx(11.5e9, rel=0.01)
    assert costs[30].flops_per_token < costs[30].num_parameters / 8


def test_mixtral_routes_to_two_of_eight() -> None:
    cost = block_costs(MIXTRAL)[0]
    assert cost.num_parameters == pytest.approx(1.45e9, rel=0.01)
    assert cost.flops_per_token == pytest.approx(2 * 0.394e9, rel=0.01)


@pytest.mark.parametrize(("quant", "ratio"), [(QuantKind.INT8, 2.0), (QuantKind.NF4, 3.55)])
def test_narrow_weights_cost_less(quant: QuantKind, ratio: float) -> None:
    wide = block_costs(LLAMA_405B)[0].weight_bytes
    assert wide / block_costs(LLAMA_405B, quant=quant)[0].weight_bytes == pytest.approx(ratio, 0.01)


def test_quantized_checkpoint_is_priced_as_stored() -> None:
    config = CONFIG_MAPPING["deepseek_v3"](
        dtype="bfloat16", quantization_config={"quant_method": "fp8"}
    )
    total = sum(cost.weight_bytes for cost in block_costs(config))
    assert total == pytest.approx(669e9, rel=0.02)


def test_plan_covers_the_model() -> None:
    result = plan(tiny_config("llama"), 3, dtype=torch.bfloat16)
    assert [str(server.blocks) for server in result.servers] == ["0:2", "2:4", "4:5"]
    assert result.dtype is torch.bfloat16


@pytest.mark.parametrize("num_servers", [0, 6])
def test_more_servers_than_blocks(num_servers: int) -> None:
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        split_evenly(5, num_servers)
