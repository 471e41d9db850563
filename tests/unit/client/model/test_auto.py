"""Loading by the auto classes: embeddings and head only, and settings in the right config."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals.client.model.auto import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedSpeculativeModel,
)
from petals.errors import ConfigError, ModelNotFound, NotSupported
from petals.models.checkpoint.arch import describe
from petals.testing.tiny_models import write_tiny_model
from support.local_blocks import LocalBlocks

PEERS = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
PROMPT = torch.tensor([[11, 54, 7, 33]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama"))


def served_here(remote, local):
    """The same model with its blocks in this process instead of a swarm."""
    remote.remote_blocks.runner = LocalBlocks(local.base_model, describe(local.config))
    return remote


def test_generates_what_the_checkpoint_generates(folder):
    local = AutoModelForCausalLM.from_pretrained(folder)
    remote = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=PEERS)
    served_here(remote, local)
    options = {"max_new_tokens": 6}
    assert torch.equal(remote.generate(PROMPT, **options), local.generate(PROMPT, **options))
    assert type(remote).__name__ == "DistributedLlamaForCausalLM"
    assert isinstance(remote, type(local))


def test_base_and_classifier(folder):
    local = AutoModelForCausalLM.from_pretrained(folder)
    base = served_here(AutoDistributedModel.from_pretrained(folder), local)
    torch.testing.assert_close(
        base(PROMPT).last_hidden_state, local.model(PROMPT).last_hidden_state.detach()
    )
    judge = AutoDistributedModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert served_here(judge, local)(PROMPT).logits.shape == (1, 3)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert {name for name, p in judge.named_parameters() if p.requires_grad} == {"score.weight"}
    assert judge.config.num_labels == whole.config.num_labels


def test_loads_the_ends_only(folder):
    remote = AutoDistributedModelForCausalLM.from_pretrained(folder)
    assert sorted(name for name, _ in remote.named_parameters()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(folder, name):
    for value, dtype in (
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, **{name: value})
        assert model.dtype == dtype


def test_client_settings_reach_the_config_and_the_swarm(folder, tmp_path):
    key = tmp_path / "key"
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=PEERS, swarm_key=key, max_retries=1, blocked_servers=["b", "a"]
    )
    assert model.config.initial_peers == PEERS
    assert model.config.blocked_servers == ["a", "b"]
    client = model.remote_blocks.sequence_manager.config
    assert client.initial_peers == tuple(PEERS)
    assert client.swarm_key == key
    assert client.max_retries == 1
    json.loads(model.config.to_json_string())


def test_the_config_alone_and_passed_on(folder):
    config = AutoDistributedConfig.from_pretrained(folder, initial_peers=PEERS, request_timeout=9)
    assert config.num_hidden_layers == 5
    assert config.request_timeout == 9
    assert config.dht_prefix.startswith("llama-")
    model = AutoDistributedModel.from_pretrained(folder, config=config, request_timeout=8)
    assert model.remote_blocks.sequence_manager.config.initial_peers == tuple(PEERS)
    assert model.remote_blocks.sequence_manager.config.request_timeout == 8
    assert model.remote_blocks.sequence_manager.block_uids[0] == f"{config.dht_prefix}.0"


def test_a_name_of_ones_own_in_the_swarm(folder):
    model = AutoDistributedModel.from_pretrained(folder, dht_prefix="mine")
    assert model.remote_blocks.sequence_manager.model == "mine"


def test_a_head_in_chunks(tmp_path):
    folder = str(write_tiny_model(tmp_path / "bloom", "bloom"))
    load = AutoDistributedModelForCausalLM.from_pretrained
    narrow = {"dtype": "bfloat16", "chunked_forward_step": 40}
    chunked = load(folder, use_chunked_forward=True, **narrow)
    assert chunked.lm_head.chunk_rows == 40
    plain = load(folder, use_chunked_forward=False, **narrow)
    hidden = torch.randn(1, 2, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(
        chunked.lm_head(hidden), plain.lm_head(hidden).float(), rtol=0.02, atol=0.05
    )


def test_what_old_scripts_pass_is_accepted(folder):
    AutoDistributedModelForCausalLM.from_pretrained(
        folder, low_cpu_mem_usage=True, use_auth_token=None, tuning_mode=None, pre_seq_len=0
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"no_such_option": 1}, ConfigError, "no_such_option"),
        ({"dtype": "int8"}, ConfigError, "floating"),
        ({"torch_dtype": "float31"}, ConfigError, "floating"),
        ({"trust_remote_code": True}, NotSupported, "trust_remote_code"),
        ({"tuning_mode": "ptune"}, ConfigError, "no token"),
        ({"request_timeout": -1}, ConfigError, "request_timeout"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_options(folder, options, error, message):
    with pytest.raises(error, match=message) as refusal:
        AutoDistributedModelForCausalLM.from_pretrained(folder, **options)
    assert refusal.value.hint


def test_an_unknown_model(tmp_path):
    with pytest.raises(ModelNotFound):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path))


def test_is_not_made_directly():
    with pytest.raises(ConfigError, match="not made directly"):
        AutoDistributedModelForCausalLM()


class TestSpeculative:
    @pytest.fixture
    def local(self, folder):
        return AutoModelForCausalLM.from_pretrained(folder)

    def test_the_small_model_drafts(self, folder, local):
        remote = AutoDistributedSpeculativeModel.from_pretrained(folder, small_model=local)
        served_here(remote, local)
        local.generation_config.assistant_confidence_threshold = 0.0
        actual = remote.generate(PROMPT, max_new_tokens=8)
        assert torch.equal(actual, local.generate(PROMPT, max_new_tokens=8))
        (session,) = remote.remote_blocks.runner.sessions
        assert (
            len(session.steps) == 1
        )  # the same model drafts, so that all of its tokens are accepted
        assert "small_model" not in dict(remote.named_modules())

    def test_sampling_and_turns(self, folder, local):
        remote = AutoDistributedSpeculativeModel.from_pretrained(folder, small_model=local)
        served_here(remote, local)
        with remote.inference_session(max_length=30):
            first = remote.generate(PROMPT, max_new_tokens=4)
            rest = remote.generate(None, max_new_tokens=4)
        whole = local.generate(PROMPT, max_new_tokens=8)
        assert torch.equal(torch.cat([first, rest], dim=1), whole)
        assert remote.generate(PROMPT, max_new_tokens=4, do_sample=True).shape == (1, 8)

    def test_other_vocabularies(self, folder, tmp_path):
        other = write_tiny_model(tmp_path / "other", "llama", vocab_size=50)
        small = AutoModelForCausalLM.from_pretrained(other)
        with pytest.raises(ConfigError, match="50 token ids"):
            AutoDistributedSpeculativeModel.from_pretrained(folder, small_model=small)

    def test_no_small_model(self, folder):
        with pytest.raises(ConfigError, match="small_model"):
            AutoDistributedSpeculativeModel.from_pretrained(folder)
