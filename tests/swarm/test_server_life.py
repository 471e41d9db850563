"""A whole server, from its config to its end, over a network in memory."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from petals.errors import BlocksNotServed, ConfigError, ModelNotFound
from petals.models.span import Span
from petals.models.split import load_blocks
from petals.server.config import (
    AnnounceConfig,
    ComputeConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.server.handler import BLOCKS_SERVICE
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, ServerState
from petals.wire.messages import SessionEnded
from served_span import Talk, assert_close

NUM_BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
async def seed() -> AsyncIterator[SwarmNode]:
    async with SwarmNode(NodeConfig(), engine=MemoryNet().engine) as node:
        yield node


@dataclass
class Running:
    """A server in a task of this event loop."""

    server: Server
    task: "asyncio.Task[None]"
    stages: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    info: OnlineInfo | None = None

    async def stop(self) -> None:
        self.server.stop()
        await self.task


def config_of(folder: Path | str, **changes: object) -> ServerConfig:
    config = ServerConfig(
        source=SourceConfig(model=str(folder)),
        compute=ComputeConfig(device="cpu", num_threads=1),
        memory=MemoryConfig(cache_tokens=512),
        announce=AnnounceConfig(public_name="somebody"),
    )
    return replace(config, **changes)


async def start(seed: SwarmNode, config: ServerConfig) -> Running:
    """Returns when the server is online; raises what ended it before that."""
    online = asyncio.Event()
    network = NodeConfig(initial_peers=await seed.addresses())

    def on_online(info: OnlineInfo) -> None:
        running.info = info
        online.set()

    watchers = Watchers(
        on_stage=lambda text: running.stages.append(text),
        on_loading=lambda done, total: running.progress.append((done, total)),
        on_online=on_online,
    )
    engine = seed.transport._net.engine
    server = Server(replace(config, network=network), watchers, engine=engine)
    running = Running(server, asyncio.create_task(server.run()))
    waiting = asyncio.create_task(online.wait())
    await asyncio.wait({running.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if running.task.done():
        running.task.result()
    return running


@asynccontextmanager
async def online(seed: SwarmNode, config: ServerConfig) -> AsyncIterator[Running]:
    running = await start(seed, config)
    try:
        yield running
    finally:
        await running.stop()


async def states_seen(seed: SwarmNode, model: str) -> list[ServerState]:
    view = await seed.directory.view(model, NUM_BLOCKS)
    return [record.state for record in view.records.values()]


async def test_a_server_comes_serves_and_goes(folder: Path, seed: SwarmNode) -> None:
    async with online(seed, config_of(folder, blocks=BlockSpan(1, 4))) as running:
        info = running.info
        assert info is not None and info.blocks == BlockSpan(1, 4)
        view = await seed.directory.view(info.model, NUM_BLOCKS)
        record = view.records[info.peer_id]
        assert (record.state, record.spans) == (ServerState.ONLINE, ((1, 4),))
        assert (record.public_name, record.dtype, record.quant) == ("somebody", "float32", None)
        assert record.inference_rps and record.forward_rps and record.throughput
        assert view.missing() == (BlockSpan(0, 1), BlockSpan(4, 5))
        assert running.progress and running.progress[-1][0] == running.progress[-1][1]
        talk = Talk(await seed.open_channel(info.peer_id, BLOCKS_SERVICE), info.blocks)
        await talk.open(model=info.model)
        text = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
        (output,) = await talk.step(0, [0], [text])
        local = Span(load_blocks(str(folder), BlockSpan(1, 4)))
        assert_close(output, local.reference(text))
    assert await states_seen(seed, info.model) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "petals-compute"]


async def test_clients_are_told_when_a_server_leaves(folder: Path, seed: SwarmNode) -> None:
    running = await start(seed, config_of(folder, blocks=BlockSpan(0, 2)))
    assert running.info is not None
    talk = Talk(await seed.open_channel(running.info.peer_id, BLOCKS_SERVICE), BlockSpan(0, 2))
    await talk.open(model=running.info.model)
    await running.stop()
    message, _ = await talk.channel.receive(5.0)
    assert isinstance(message, SessionEnded)
    assert "stopped" in message.reason


async def test_servers_fill_the_gaps(folder: Path, seed: SwarmNode) -> None:
    config = config_of(folder, num_blocks=2)
    async with online(seed, config) as first, online(seed, config) as second:
        async with online(seed, config) as third:
            spans = [running.info.blocks for running in (first, second, third) if running.info]
            assert spans == [BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(3, 5)]


async def test_servers_that_start_together_do_not_all_choose_the_same(
    folder: Path, seed: SwarmNode
) -> None:
    config = config_of(folder, num_blocks=2)
    both = await asyncio.gather(start(seed, config), start(seed, config))
    spans = {running.info.blocks for running in both if running.info}
    for running in both:
        await running.stop()
    assert spans == {BlockSpan(0, 2), BlockSpan(2, 4)}


async def test_as_many_blocks_as_fit_are_served(folder: Path, seed: SwarmNode) -> None:
    async with online(seed, config_of(folder)) as running:
        assert running.info is not None and running.info.blocks == BlockSpan(0, NUM_BLOCKS)


async def test_a_draining_server_takes_no_new_sessions(folder: Path, seed: SwarmNode) -> None:
    running = await start(seed, config_of(folder, blocks=BlockSpan(0, 2)))
    assert running.info is not None
    channel = await seed.open_channel(running.info.peer_id, BLOCKS_SERVICE)
    talk = Talk(channel, BlockSpan(0, 2))
    running.server.stop()
    refusal = await talk.refused(talk.opening(model=running.info.model))
    assert refusal.code == "peer_busy"
    await running.task


async def test_stopping_a_start_leaves_nothing(folder: Path, seed: SwarmNode) -> None:
    joining = asyncio.Event()
    network = NodeConfig(initial_peers=await seed.addresses())
    config = replace(config_of(folder, blocks=BlockSpan(0, 5)), network=network)

    def on_stage(text: str) -> None:
        if text.startswith("Loading"):
            joining.set()

    server = Server(config, Watchers(on_stage=on_stage), engine=seed.transport._net.engine)
    task = asyncio.create_task(server.run())
    await joining.wait()
    model = (await seed.directory.models())[0].model
    assert await states_seen(seed, model) == [ServerState.JOINING]
    server.stop()
    await task
    assert await states_seen(seed, model) == []


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
        await start(seed, config_of(folder, **changes))
    assert caught.value.hint
    assert await seed.directory.models() == ()


async def test_a_told_throughput_is_what_is_announced(folder: Path, seed: SwarmNode) -> None:
    config = config_of(folder, blocks=BlockSpan(0, 1), announce=AnnounceConfig(throughput=12.5))
    async with online(seed, config) as running:
        assert running.info is not None
        view = await seed.directory.view(running.info.model, NUM_BLOCKS)
        assert view.records[running.info.peer_id].throughput == 12.5
