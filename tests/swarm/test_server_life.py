"""A whole server, from its config to its end, over a network in memory."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petals.errors import (
    BlocksNotServed,
    ConfigError,
    ModelNotFound,
    PeerFailed,
    PeerUnreachable,
)
from petals.models.loading.split import load_blocks
from petals.models.runtime.span import Span
from petals.server.compute.scheduler import Scheduler
from petals.server.config import (
    AnnounceConfig,
    ComputeConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, ServerState
from petals.wire.header import RequestHeader
from petals.wire.replies import Draining, SessionEnded
from petals.wire.requests import Step
from petals.wire.services import BLOCKS_SERVICE
from support.service import Talk, assert_close

NUM_BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
async def seed() -> AsyncIterator[SwarmNode]:
    async with SwarmNode(NodeConfig(), engine=MemoryNet().engine) as node:
        yield node


def config_of(folder: Path | str, **changes: object) -> ServerConfig:
    config = ServerConfig(
        source=SourceConfig(model=str(folder)),
        compute=ComputeConfig(device="cpu", num_threads=1),
        memory=MemoryConfig(cache_tokens=512),
        announce=AnnounceConfig(public_name="somebody"),
    )
    return replace(config, **changes)


async def server_in(
    seed: SwarmNode, config: ServerConfig, watchers: Watchers | None = None
) -> Server:
    network = NodeConfig(initial_peers=await seed.addresses())
    engine = seed.transport._net.engine
    return Server(replace(config, network=network), watchers, engine=engine)


@asynccontextmanager
async def online(
    seed: SwarmNode, config: ServerConfig, watchers: Watchers | None = None
) -> AsyncIterator[OnlineInfo]:
    async with await server_in(seed, config, watchers) as server:
        assert server.info is not None
        yield server.info


async def states_seen(seed: SwarmNode, model: str) -> list[ServerState]:
    view = await seed.directory.view(model, NUM_BLOCKS)
    return [record.state for record in view.records.values()]


async def test_a_server_comes_serves_and_goes(folder: Path, seed: SwarmNode) -> None:
    stages: list[str] = []
    progress: list[tuple[int, int]] = []
    watchers = Watchers(
        on_stage=stages.append, on_loading=lambda done, total: progress.append((done, total))
    )
    async with online(seed, config_of(folder, blocks=BlockSpan(1, 4)), watchers) as info:
        assert info.blocks == BlockSpan(1, 4)
        view = await seed.directory.view(info.model, NUM_BLOCKS)
        record = view.records[info.peer_id]
        assert (record.state, record.spans) == (ServerState.ONLINE, ((1, 4),))
        assert (record.public_name, record.dtype, record.quant) == ("somebody", "float32", None)
        assert record.inference_rps and record.throughput
        assert view.missing() == (BlockSpan(0, 1), BlockSpan(4, 5))
        talk = Talk(await seed.open_channel(info.peer_id, BLOCKS_SERVICE), info.blocks)
        await talk.open(model=info.model)
        text = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
        (output,) = await talk.step(0, [0], [text])
        local = Span(load_blocks(str(folder), BlockSpan(1, 4)))
        assert_close(output, local.reference(text))
        await talk.close()
    assert [stage.split()[0] for stage in stages] == [
        *("Looking", "Joining", "Loading", "Online:", "Draining")
    ]
    assert progress[-1][0] == progress[-1][1] > 0
    assert await states_seen(seed, info.model) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "petals-compute"]


async def test_the_directory_names_no_folder_of_ours(folder: Path, seed: SwarmNode) -> None:
    async with online(seed, config_of(folder, blocks=BlockSpan(0, 1))):
        (summary,) = await seed.directory.models()
        assert summary.repository == folder.name


async def test_clients_are_told_when_a_server_leaves(folder: Path, seed: SwarmNode) -> None:
    config = config_of(folder, blocks=BlockSpan(0, 2), drain_seconds=0.1)
    async with online(seed, config) as info:
        talk = Talk(await seed.open_channel(info.peer_id, BLOCKS_SERVICE), info.blocks)
        await talk.open(model=info.model)
    word, _ = await talk.channel.receive(5.0)
    assert isinstance(word, Draining)
    message, _ = await talk.channel.receive(5.0)
    assert isinstance(message, SessionEnded)
    assert "stopped" in message.reason


async def test_a_leaving_server_serves_the_sessions_it_has_and_no_others(
    folder: Path, seed: SwarmNode
) -> None:
    async with await server_in(seed, config_of(folder, blocks=BlockSpan(0, 2))) as server:
        info = server.info
        assert info is not None
        talk = Talk(await seed.open_channel(info.peer_id, BLOCKS_SERVICE), info.blocks)
        await talk.open(model=info.model)
        server.stop()
        word, _ = await talk.channel.receive(5.0)
        assert isinstance(word, Draining)
        assert 50 < word.seconds <= 60
        assert await states_seen(seed, info.model) == [ServerState.DRAINING]
        other = Talk(await seed.open_channel(info.peer_id, BLOCKS_SERVICE), info.blocks, b"o" * 16)
        refusal = await other.refused(other.opening(model=info.model))
        assert refusal.code == "peer_busy"
        await talk.step(0, [0], [torch.zeros(3, 32)])
        await talk.close()
        # Its last session has gone: it does not stay for those who only look on.
        assert server._task is not None
        await server._task
        with pytest.raises(PeerUnreachable):
            await other.channel.receive(5.0)


async def test_who_asks_twice_does_not_wait_for_sessions(folder: Path, seed: SwarmNode) -> None:
    async with await server_in(seed, config_of(folder, blocks=BlockSpan(0, 2))) as server:
        assert server.info is not None
        channel = await seed.open_channel(server.info.peer_id, BLOCKS_SERVICE)
        talk = Talk(channel, server.info.blocks)
        await talk.open(model=server.info.model)
        server.stop()
        assert isinstance((await channel.receive(5.0))[0], Draining)
        server.stop()
        assert isinstance((await channel.receive(5.0))[0], SessionEnded)


async def test_nobody_stays_for_clients_that_have_hung_up(folder: Path, seed: SwarmNode) -> None:
    async with await server_in(seed, config_of(folder, blocks=BlockSpan(0, 2))) as server:
        assert server.info is not None
        channel = await seed.open_channel(server.info.peer_id, BLOCKS_SERVICE)
        await Talk(channel, server.info.blocks).open(model=server.info.model)
        await channel.close()


async def test_servers_fill_the_gaps(folder: Path, seed: SwarmNode) -> None:
    config = config_of(folder, num_blocks=2)
    async with online(seed, config) as first, online(seed, config) as second:
        async with online(seed, config) as third:
            spans = [info.blocks for info in (first, second, third)]
            assert spans == [BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(3, 5)]


async def test_servers_that_start_together_do_not_all_choose_the_same(
    folder: Path, seed: SwarmNode
) -> None:
    config = config_of(folder, num_blocks=2)
    servers = [await server_in(seed, config) for _ in range(2)]
    await asyncio.gather(*(server.__aenter__() for server in servers))
    spans = {server.info.blocks for server in servers if server.info}
    await asyncio.gather(*(server.__aexit__() for server in servers))
    assert spans == {BlockSpan(0, 2), BlockSpan(2, 4)}


async def test_as_many_blocks_as_fit_are_served(folder: Path, seed: SwarmNode) -> None:
    async with online(seed, config_of(folder)) as info:
        assert info.blocks == BlockSpan(0, NUM_BLOCKS)


async def test_stopping_a_start_leaves_nothing(folder: Path, seed: SwarmNode) -> None:
    joining = asyncio.Event()

    def on_stage(text: str) -> None:
        if text.startswith("Loading"):
            joining.set()

    config = config_of(folder, blocks=BlockSpan(0, 5))
    server = await server_in(seed, config, Watchers(on_stage=on_stage))
    task = asyncio.create_task(server.run())
    await joining.wait()
    model = (await seed.directory.models())[0].model
    assert await states_seen(seed, model) == [ServerState.JOINING]
    server.stop()
    await task
    assert await states_seen(seed, model) == []


async def test_a_server_whose_compute_thread_fails_leaves(
    folder: Path, seed: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await server_in(seed, config_of(folder, blocks=BlockSpan(0, 2)))
    with pytest.raises(PeerFailed, match="compute thread has failed"):
        async with server:
            assert server.info is not None
            channel = await seed.open_channel(server.info.peer_id, BLOCKS_SERVICE)
            talk = Talk(channel, server.info.blocks)
            await talk.open(model=server.info.model)
            monkeypatch.setattr(Scheduler, "ran", lambda *portions: 1 // 0)
            step = Step(RequestHeader(talk.session_id, 0, 0), (0,), (3,))
            assert (await talk.refused(step, torch.zeros(3, 32))).code == "peer_failed"
            with pytest.raises(PeerUnreachable):
                while True:
                    await channel.receive(10.0)
    assert await states_seen(seed, server.info.model) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source": SourceConfig(model="no/such folder")}, ModelNotFound),
        ({"blocks": BlockSpan(3, 9)}, BlocksNotServed),
        ({"compute": ComputeConfig(device="cuda")}, ConfigError),
    ],
)
async def test_what_cannot_start_says_why(
    folder: Path, seed: SwarmNode, changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        async with online(seed, config_of(folder, **changes)):
            pass
    assert caught.value.hint
    assert await seed.directory.models() == ()


async def test_a_told_throughput_is_what_is_announced(folder: Path, seed: SwarmNode) -> None:
    config = config_of(folder, blocks=BlockSpan(0, 1), announce=AnnounceConfig(throughput=12.5))
    async with online(seed, config) as info:
        view = await seed.directory.view(info.model, NUM_BLOCKS)
        assert view.records[info.peer_id].throughput == 12.5
