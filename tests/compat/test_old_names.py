"""Scripts written for the original Petals: their imports, classes and calls."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from petals import declare_active_modules, register_model_classes
from petals.client import ClientConfig, InferenceSession, RemoteSequenceManager
from petals.client.model import legacy
from petals.constants import DTYPE_MAP
from petals.data_structures import parse_uid
from petals.errors import ConfigError, ModelNotSupported, NotSupported
from petals.server.block_utils import get_block_size, resolve_block_dtype
from petals.server.from_pretrained import load_pretrained_block
from petals.utils.misc import DUMMY, DUMMY_KEY_PAST, get_size_in_bytes, is_dummy
from petals.utils.version import get_compatible_model_repo
from support.local_blocks import run_here
from support.reference import assert_close

KINDS = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")


@pytest.fixture
def folders(llama, bloom):
    return {"llama": str(llama), "bloom": str(bloom)}


NAMES = {
    "petals": """
        AutoDistributedConfig AutoDistributedModel AutoDistributedModelForCausalLM
        AutoDistributedModelForSequenceClassification AutoDistributedSpeculativeModel ClientConfig
        InferenceSession NoSpendingPolicy RemoteSequenceManager RemoteSequential SpendingPolicyBase
        DistributedLlamaForSpeculativeGeneration declare_active_modules get_remote_module_infos
        register_model_classes WrappedBloomBlock WrappedFalconBlock WrappedLlamaBlock
        WrappedMixtralBlock __version__
    """,
    "petals.client": """
        ClientConfig InferenceSession NoSpendingPolicy RemoteSequenceManager RemoteSequential
        SpendingPolicyBase
    """,
    "petals.client.config": "ClientConfig",
    "petals.client.inference_session": "InferenceSession",
    "petals.client.model.inference_session": "InferenceSession",
    "petals.client.model.remote_sequential": "RemoteSequential",
    "petals.client.remote_sequential": "RemoteSequential",
    "petals.client.routing": "NoSpendingPolicy RemoteSequenceManager SpendingPolicyBase",
    "petals.client.routing.sequence_manager": """
        MissingBlocksError RemoteSequenceManager SequenceManagerConfig
    """,
    "petals.client.routing.spending_policy": "NoSpendingPolicy SpendingPolicyBase",
    "petals.constants": "DTYPE_MAP PUBLIC_INITIAL_PEERS",
    "petals.data_structures": """
        CHAIN_DELIMITER ModuleUID RemoteModuleInfo RemoteSpanInfo ServerInfo ServerState
        UID_DELIMITER parse_uid
    """,
    "petals.dht_utils": "declare_active_modules get_remote_module_infos",
    "petals.server.block_functions": "MAX_SHORT_INFERENCE_TOKENS MAX_NF4_SHORT_INFERENCE_TOKENS",
    "petals.server.block_utils": "get_block_size resolve_block_dtype",
    "petals.server.from_pretrained": "load_pretrained_block",
    "petals.server.handler": "CACHE_TOKENS_AVAILABLE",
    "petals.utils.auto_config": """
        AutoDistributedConfig AutoDistributedModel AutoDistributedModelForCausalLM
        AutoDistributedModelForSequenceClassification register_model_classes
    """,
    "petals.utils.convert_block": "QuantType",
    "petals.utils.dht": "compute_spans declare_active_modules get_remote_module_infos",
    "petals.utils.logging": "initialize_logs",
    "petals.utils.misc": "DUMMY DUMMY_INT64 DUMMY_KEY_PAST get_size_in_bytes is_dummy",
    "petals.utils.peft": "check_peft_repository",
    "petals.utils.version": "get_compatible_model_repo",
}
"""What the original's README, notebooks, public tests and benchmark scripts import, by module."""


@pytest.mark.parametrize("module", NAMES)
def test_import_paths(module):
    for name in NAMES[module].split():
        assert getattr(importlib.import_module(module), name) is not None


def test_old_paths_lead_to_the_same_objects():
    homes = {}
    for module, names in NAMES.items():
        for name in set(names.split()) - {"__version__"}:
            homes.setdefault(name, []).append(getattr(importlib.import_module(module), name))
    assert {name for name, found in homes.items() if any(one is not found[0] for one in found)} == (
        set()
    )


MANAGER_ATTRIBUTES = """
    block_uids config dht get_request_metadata get_retry_delay is_alive make_sequence
    on_request_failure on_request_success policy rpc_info shutdown state update
"""
SESSION_ATTRIBUTES = """
    __enter__ __exit__ close last_token_id num_blocks output_ids past_key_values position step
"""
BLOCKS_ATTRIBUTES = """
    __getitem__ __iter__ __len__ active_session config forward inference_session position
    sequence_manager use_session
"""


def test_attributes_that_scripts_use(folders):
    model = legacy.DistributedLlamaForCausalLM.from_pretrained(folders["llama"])
    manager = model.transformer.h.sequence_manager
    for owner, names in (
        (type(manager), set(MANAGER_ATTRIBUTES.split()) - {"dht", "policy", "state"}),
        (manager, {"dht", "policy", "state"}),
        (InferenceSession(manager, 10), SESSION_ATTRIBUTES.split()),
        (model.transformer.h, BLOCKS_ATTRIBUTES.split()),
        (model, ["active_session", "inference_session", "lm_head", "transformer", "use_session"]),
        (model.transformer, ["h", "ln_f", "word_embeddings", "word_embeddings_layernorm"]),
    ):
        assert [name for name in names if not hasattr(owner, name)] == []


def test_calls_that_make_no_sense_here_are_refused():
    for call in (lambda: declare_active_modules(None, ["m.0"]), register_model_classes):
        with pytest.raises(NotSupported) as refusal:
            call()
        assert refusal.value.hint


def test_small_functions():
    assert parse_uid("my.model.12") == ("my.model", 12)
    with pytest.raises(ConfigError, match="not the uid"):
        parse_uid("my-model")
    assert get_size_in_bytes(torch.bfloat16) == 2 and get_size_in_bytes(torch.bool) == 1
    assert is_dummy(DUMMY) and not is_dummy(torch.ones(1))
    assert get_compatible_model_repo("bigscience/bloom-petals") == "bigscience/bloom"
    assert get_compatible_model_repo("some/llama") == "some/llama"
    assert DTYPE_MAP["bfloat16"] is torch.bfloat16 and DTYPE_MAP["auto"] == "auto"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_blocks(stored):
    config = LlamaConfig(dtype=stored)
    auto = torch.bfloat16 if stored is torch.float32 else stored
    assert resolve_block_dtype(config, "auto") == resolve_block_dtype(config, None) == auto
    assert resolve_block_dtype(config, torch.float32) is torch.float32
    num_bytes = get_block_size(config, "memory", dtype=torch.float32)
    assert num_bytes == 2 * get_block_size(config, "disk")


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_block_alone(folders, family):
    local = AutoModelForCausalLM.from_pretrained(folders[family], output_hidden_states=True)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    states = local(ids).hidden_states
    block = load_pretrained_block(folders[family], 1, torch_dtype=torch.float32)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
    inputs = states[1].detach().requires_grad_()
    (output,) = block(inputs)
    assert_close(output, states[2])
    output.sum().backward()
    assert inputs.grad.abs().sum() > 0
    cache, parts = (DUMMY_KEY_PAST, DUMMY_KEY_PAST), []
    for position in range(4):
        part = states[1][:, position : position + 1]
        output, cache = block.forward(part, use_cache=True, layer_past=cache)
        parts.append(output)
    assert_close(torch.cat(parts, 1), states[2])


LOGGING_SCRIPT = """
import logging
{imports}
from petals import ClientConfig
from petals.constants import PUBLIC_INITIAL_PEERS
logging.getLogger().info("Final result: speed=%.2f", 1.5)
print(len(logging.getLogger().handlers))
"""


@pytest.mark.parametrize(
    ("imports", "env", "is_shown"),
    [
        ("from hivemind.utils.logging import get_logger; get_logger()", {}, True),
        ("import hivemind.utils.logging", {"PETALS_LOGGING": "False"}, False),
        ("", {}, False),
    ],
)
def test_logs_of_scripts_that_use_hivemind(imports, env, is_shown):
    script = LOGGING_SCRIPT.format(imports=imports)
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("Final result: speed=1.50" in ran.stderr) == is_shown
    assert ran.stdout == f"{int(is_shown)}\n"


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
