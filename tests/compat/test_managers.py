"""Sequence managers and lists of blocks as scripts of the original make, change and extend them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hivemind.proto import runtime_pb2
from transformers import PretrainedConfig

from petals import AutoDistributedConfig, InferenceSession, RemoteSequenceManager, RemoteSequential
from petals.data_structures import UID_DELIMITER, ServerState
from petals.errors import (
    ConfigError,
    LengthExceeded,
    MissingBlocksError,
    NotSupported,
    UnknownAdapter,
)
from petals.server.handler import CACHE_TOKENS_AVAILABLE
from petals.types import BlockSpan
from petals.utils.dht import compute_spans, get_remote_module_infos
from support.peft_adapters import peft_model, save_adapter
from support.reference import assert_close
from support.swarm import HIDDEN, RealSwarm, real_swarm

STATES = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[11, 54, 7, 33]])
FLOAT16 = runtime_pb2.CompressionType.FLOAT16


@pytest.fixture(scope="module")
def poems(llama, tmp_path_factory) -> Path:
    return save_adapter(llama, tmp_path_factory.mktemp("adapters") / "poems", seed=9)


@pytest.fixture(scope="module")
def swarm(llama, poems) -> Iterator[RealSwarm]:
    with real_swarm(llama, BlockSpan(0, 5), cache_tokens=512, adapters=(str(poems),)) as swarm:
        yield swarm


@pytest.fixture
def config(swarm) -> PretrainedConfig:
    return AutoDistributedConfig.from_pretrained(
        swarm.server_config.source.model,
        initial_peers=swarm.model().config.initial_peers,
        dht_prefix=swarm.model_id,
    )


@pytest.fixture
def whole(config) -> RemoteSequential:
    return RemoteSequential(config)


def uids(config: PretrainedConfig, start: int, end: int) -> list[str]:
    return [f"{config.dht_prefix}{UID_DELIMITER}{block}" for block in range(start, end)]


def test_the_blocks_are_those_of_the_manager(config, whole):
    expected = whole[2:4](STATES)
    with RemoteSequenceManager(config, uids(config, 2, 4)) as manager:
        blocks = RemoteSequential(config, sequence_manager=manager)
        assert blocks.sequence_manager is manager
        assert len(blocks) == 2
        assert_close(blocks(STATES), expected)
        assert_close(blocks[1:](blocks[0](STATES)), expected)
        with blocks.inference_session(max_length=4) as session:
            assert_close(session.step(STATES), expected)
        with InferenceSession(manager, 4) as session:
            assert_close(session.step(STATES), expected)


def test_a_route_counts_from_the_managers_first_block(config, swarm):
    with RemoteSequenceManager(config, uids(config, 2, 5)) as manager:
        assert not manager.ready.is_set()
        for mode in ("min_latency", "max_throughput"):
            (span,) = manager.make_sequence(mode=mode)
            assert (span.start, span.end, span.length) == (0, 3, 3)
            assert (span.peer_id, span.state) == (swarm.peers[0], ServerState.ONLINE)
            assert span.server_info.adapters == ("poems",)
            assert manager.ready.is_set() and manager._thread.ready.is_set()
        (span,) = manager.make_sequence(1, 2, mode="min_latency")
        assert (span.start, span.end) == (1, 2)
        assert manager.is_alive()
    assert not manager.is_alive()


def test_an_adapter_chosen_after_loading(swarm, llama):
    model, local = swarm.model(), swarm.local
    adapted = peft_model(llama, seed=9).eval()
    with torch.no_grad():
        plain = model(IDS).logits
        assert_close(plain, local(IDS).logits)
        expected = adapted(IDS).logits
        assert not torch.allclose(plain, expected, atol=1e-3)
        with model.inference_session(max_length=8) as opened_before:
            model(IDS[:, :2])
            model.config.active_adapter = "poems"
            opened = model(IDS[:, 2:]).logits
            assert_close(opened, plain[:, 2:])  # a session keeps the adapter it began with
        assert opened_before.position == 4
        assert_close(model(IDS).logits, expected)
        with model.inference_session(max_length=8):
            assert_close(model(IDS).logits, expected)
        model.config.active_adapter = "prose"
        with pytest.raises(UnknownAdapter, match="prose"):
            model(IDS)
        model.config.active_adapter = None
        assert_close(model(IDS).logits, plain)


def test_a_backward_pass_has_the_adapter_of_its_forward_pass(whole, config):
    inputs = STATES.clone().requires_grad_()
    whole(inputs).sum().backward()
    expected, inputs.grad = inputs.grad, None
    output = whole(inputs)
    config.active_adapter = "poems"
    output.sum().backward()
    assert_close(inputs.grad, expected)
    inputs.grad = None
    whole(inputs).sum().backward()
    assert not torch.allclose(inputs.grad, expected, atol=1e-3)


def test_settings_may_change_and_the_swarm_may_not(whole, config):
    whole(STATES)
    config.allowed_servers = []
    with pytest.raises(MissingBlocksError):
        whole(STATES)
    config.allowed_servers, config.max_retries = None, 0
    assert whole.sequence_manager.config.num_retries == 0
    whole(STATES)
    config.request_timeout = -1
    with pytest.raises(ConfigError, match="request_timeout=-1"):
        whole(STATES)
    config.request_timeout = 30
    config.initial_peers = ["/ip4/192.0.2.1/tcp/1"]
    with pytest.raises(ConfigError, match="initial_peers was set after") as refusal:
        whole(STATES)
    assert "initial_peers=" in refusal.value.hint


def test_cache_is_counted_to_the_token(whole):
    """As the original's server statistics: free tokens of one block."""
    three, one = whole[2:5], whole[4:5]

    def free(blocks: RemoteSequential) -> int:
        blocks.sequence_manager.state.rpc_info = None
        return blocks.sequence_manager.rpc_info[CACHE_TOKENS_AVAILABLE]

    before = free(three)
    with three.inference_session(max_length=50) as session:
        session.step(STATES[:1])
        within = free(three)
        assert before - within == 150
        with one.inference_session(max_length=10) as other:
            other.step(STATES[:1])
            assert within - free(one) == 10
    assert three.sequence_manager.rpc_info[CACHE_TOKENS_AVAILABLE] == within
    assert free(three) == before


def test_a_length_that_is_exceeded(whole):
    with whole.inference_session(max_length=4) as session:
        session.step(STATES)
        with pytest.raises(ValueError, match="Maximum length exceeded") as refusal:
            session.step(STATES[:, :1])
        assert "Maximum length exceeded" in repr(refusal.value)
        assert isinstance(refusal.value, LengthExceeded)


@dataclass
class Described:
    """A tensor's description, with the attribute that hivemind's has."""

    compression: int


class Compressing(RemoteSequenceManager):
    """Asks for compression as subclasses of the original's manager do."""

    schema = FLOAT16
    outputs = {"rpc_forward": FLOAT16, "rpc_backward": FLOAT16}

    @property
    def rpc_info(self):
        return super().rpc_info | {"forward_schema": ((Described(self.schema),), {})}

    def get_request_metadata(self, protocol, *args, **kwargs):
        metadata = super().get_request_metadata(protocol, *args, **kwargs)
        if protocol in self.outputs:
            metadata["output_compression"] = (self.outputs[protocol],)
        return metadata


def run_back(blocks: RemoteSequential) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = STATES.clone().requires_grad_()
    output = blocks(inputs)
    (output * STATES).sum().backward()
    return output.detach(), inputs.grad


def is_rounded(found: torch.Tensor, exact: torch.Tensor) -> bool:
    difference = (found - exact).abs().max() / exact.abs().max()
    return bool(1e-5 < difference < 1e-2)


def test_compression_by_a_subclass(config, whole):
    exact = run_back(whole)
    with Compressing(config, uids(config, 0, 5)) as manager:
        for blocks in (RemoteSequential(config, sequence_manager=manager),):
            output, gradient = run_back(blocks)
            assert output.dtype == gradient.dtype == torch.float32
            assert is_rounded(output, exact[0])
            assert is_rounded(gradient, exact[1])
            half = blocks[:3]
            assert isinstance(half.sequence_manager, Compressing)
            assert is_rounded(half(STATES), whole[:3](STATES))
        with blocks.inference_session(max_length=4) as session:  # only passes were to be compressed
            assert_close(session.step(STATES), exact[0])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_compression_by_the_config(config, whole, name):
    exact = run_back(whole)
    config.wire_dtype = name
    output, gradient = run_back(whole)
    bound = 1e-2 if name == "float16" else 1e-1
    for found, right in zip((output, gradient), exact):
        assert 1e-5 < (found - right).abs().max() / right.abs().max() < bound
    with whole.inference_session(max_length=4) as session:
        found = session.step(STATES)
        assert found.dtype == torch.float32
        assert 1e-5 < (found - exact[0]).abs().max() / exact[0].abs().max() < bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": runtime_pb2.CompressionType.UNIFORM_8BIT}, "type 4 of hivemind"),
        ({"schema": 0, "outputs": {"rpc_backward": FLOAT16}}, "Gradients cannot be compressed"),
    ],
)
def test_compression_that_is_not_offered(config, changes, message):
    with type("Asking", (Compressing,), changes)(config, uids(config, 0, 5)) as manager:
        with pytest.raises(NotSupported, match=message) as refusal:
            RemoteSequential(config, sequence_manager=manager)(STATES)
        assert refusal.value.hint


def test_servers_of_each_block(config, swarm):
    dht = SimpleNamespace(initial_peers=config.initial_peers, client_mode=True)
    modules = get_remote_module_infos(dht, uids(config, 1, 4), latest=True)
    assert [module.uid for module in modules] == uids(config, 1, 4)
    (peer,) = swarm.peers
    for module in modules:
        assert module.servers.keys() == {peer}
        info = module.servers[peer]
        assert (info.state, info.start_block, info.end_block) == (ServerState.ONLINE, 0, 5)
        assert (info.torch_dtype, info.quant_type) == ("float32", "none")
    spans = compute_spans(modules, min_state=ServerState.ONLINE)
    assert [(span.peer_id, span.start, span.end) for span in spans.values()] == [(peer, 0, 3)]
    for name, peers in (("poems", {peer}), ("prose", set())):
        (module,) = get_remote_module_infos(dht, uids(config, 0, 1), active_adapter=name)
        assert module.servers.keys() == peers


def test_metadata_of_a_request(config):
    config.active_adapter = "poems"
    with RemoteSequenceManager(config, uids(config, 0, 5)) as manager:
        metadata = manager.get_request_metadata("rpc_inference", None, manager.block_uids)
        assert metadata == {"points": 0.0, "active_adapter": "poems", "args_structure": None}
        assert [manager.get_retry_delay(attempt) for attempt in range(4)] == [0, 1, 2, 4]


def test_a_manager_that_tells_of_its_shutdown(config):
    """A subclass with a constructor of its own, as the original's tests have one."""

    class Telling(RemoteSequenceManager):
        def __init__(self, *args, told: list, **kwargs):
            super().__init__(*args, **kwargs)
            self.told = told

        def shutdown(self):
            super().shutdown()
            self.told.append(self.is_alive())

    told = []
    blocks = RemoteSequential(
        config, sequence_manager=Telling(config, uids(config, 0, 5), told=told)
    )
    blocks(STATES)
    assert isinstance(blocks[1:3].sequence_manager, Telling)
    blocks.sequence_manager.shutdown()
    assert told == [False]
