"""Scripts written for the original Petals: their imports, classes and calls."""

import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from petals.client import ClientConfig, InferenceSession, RemoteSequenceManager
from petals.client.model import legacy
from petals.errors import ConfigError, ModelNotSupported
from support.local_blocks import run_here

KINDS = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")


@pytest.fixture
def folders(llama, bloom):
    return {"llama": str(llama), "bloom": str(bloom)}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("petals.client", ["ClientConfig", "InferenceSession", "RemoteSequential"]),
        ("petals.client", ["RemoteSequenceManager"]),
        ("petals.client.model.remote_sequential", ["RemoteSequential"]),
        ("petals.client.model.inference_session", ["InferenceSession"]),
    ],
)
def test_import_paths(module, names):
    for name in names:
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_a_session_of_a_manager():
    with RemoteSequenceManager(ClientConfig(dht_prefix="m"), ["m.0", "m.1"]) as manager:
        session = InferenceSession(manager, 10)
        assert (session.num_blocks, session.max_length, session.position) == (2, 10, 0)
        for name in ("output_ids", "past_key_values", "last_token_id"):
            assert getattr(session, name) is None


def test_a_name_that_never_was():
    import petals.client

    for module in (legacy, petals.client):
        with pytest.raises(AttributeError, match="NoSuchName"):
            _ = module.NoSuchName
    with pytest.raises(AttributeError, match="DistributedLlamaForPoetry"):
        _ = legacy.DistributedLlamaForPoetry


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", list(legacy.FAMILIES))
def test_every_family_has_its_classes(family, kind):
    name = f"Distributed{family}{kind}"
    assert getattr(legacy, name).__name__ == name
    assert getattr(legacy, name) is getattr(legacy, name)


def test_a_family_loads_its_own_models(folders):
    model = legacy.DistributedLlamaForCausalLM.from_pretrained(folders["llama"])
    assert isinstance(model, legacy.DistributedLlamaForCausalLM)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.transformer, legacy.DistributedLlamaModel)
    base = legacy.DistributedBloomModel.from_pretrained(folders["bloom"])
    assert isinstance(base, legacy.DistributedBloomModel)
    judge = legacy.DistributedBloomForSequenceClassification.from_pretrained(folders["bloom"])
    assert isinstance(judge, legacy.DistributedBloomForSequenceClassification)


def test_a_family_refuses_the_others(folders):
    for kind in ("ForCausalLM", "Config"):
        with pytest.raises(ModelNotSupported) as refusal:
            getattr(legacy, f"DistributedBloom{kind}").from_pretrained(folders["llama"])
        assert "Auto" in refusal.value.hint


def test_configs(folders):
    config = legacy.DistributedLlamaConfig.from_pretrained(folders["llama"], max_retries=2)
    assert isinstance(config, legacy.DistributedLlamaConfig)
    assert isinstance(config, LlamaConfig)
    assert not isinstance(config, legacy.DistributedBloomConfig)
    assert config.max_retries == 2


def test_speculative_generation(folders):
    folder = folders["llama"]
    small = AutoModelForCausalLM.from_pretrained(folder)
    config = legacy.DistributedLlamaConfig.from_pretrained(folder)
    prompt = torch.tensor([[5, 6, 7]])
    expected = small.generate(prompt, max_new_tokens=5)
    made = legacy.DistributedLlamaForSpeculativeGeneration(config, small)
    loaded = legacy.DistributedLlamaForSpeculativeGeneration.from_pretrained(
        folder, small_model=small
    )
    for model in (made, loaded):
        assert isinstance(model, legacy.DistributedLlamaForSpeculativeGeneration)
        model = run_here(model, folder)
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    plain = legacy.DistributedLlamaForCausalLM.from_pretrained(folder)
    assert not isinstance(plain, legacy.DistributedLlamaForSpeculativeGeneration)
    with pytest.raises(ConfigError, match="which model"):
        legacy.DistributedLlamaForSpeculativeGeneration(LlamaConfig(), small)


def test_a_path_of_ones_own_through_bloom(folders):
    """As the original's notebooks did: embed, run some blocks, norm, head."""
    remote = run_here(
        legacy.DistributedBloomForCausalLM.from_pretrained(folders["bloom"]), folders["bloom"]
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = remote(ids).logits
        hidden = remote.transformer.word_embeddings(ids)
        hidden = remote.transformer.word_embeddings_layernorm(hidden)
        hidden = remote.transformer.h[2:](remote.transformer.h[:2](hidden))
        logits = remote.lm_head(remote.transformer.ln_f(hidden))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_chat_loop(folders):
    """As in the original's README: one session, one generate per turn."""
    folder = folders["bloom"]
    remote = run_here(legacy.DistributedBloomForCausalLM.from_pretrained(folder), folder)
    local = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    with remote.inference_session(max_length=64) as session:
        for turn in ([5, 6, 7], [8], [9, 10]):
            prefix = torch.tensor([turn])
            while True:
                answer = remote.generate(prefix, max_new_tokens=1, do_sample=0, session=session)
                tokens = torch.cat([tokens, answer], dim=1)
                prefix = None
                if tokens.shape[1] % 8 == 0:
                    break
            assert torch.equal(session.output_ids, tokens)
    assert torch.equal(tokens[:, :8], local.generate(tokens[:, :3], max_new_tokens=5))
