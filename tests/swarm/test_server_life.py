"""A whole server, from its config to its end, over a network in memory."""

import asyncio
import threading
from collections.abc import AsyncIterator
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
    LimitsConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.server.server import Server, Watchers
from petals.testing.in_process_swarm import InProcessSwarm
from petals.types import BlockSpan, PeerId, ServerState
from petals.wire.header import RequestHeader
from petals.wire.replies import Draining, SessionEnded
from petals.wire.requests import Step
from petals.wire.services import BLOCKS_SERVICE
from support.reference import assert_close, states
from support.talk import Talk

NUM_BLOCKS = 5


@pytest.fixture
async def swarm(llama: Path) -> AsyncIterator[InProcessSwarm]:
    """No server yet; each test starts its own."""
    config = ServerConfig(
        source=SourceConfig(model=str(llama)),
        compute=ComputeConfig(device="cpu", num_threads=1),
        memory=MemoryConfig(cache_tokens=512),
        announce=AnnounceConfig(public_name="somebody"),
    )
    async with InProcessSwarm(config) as swarm:
        yield swarm


async def talk_to(swarm: InProcessSwarm, peer: PeerId, session_id: bytes = b"s" * 16) -> Talk:
    channel = await swarm.node.open_channel(peer, BLOCKS_SERVICE)
    return Talk(channel, swarm.info(peer).blocks, session_id)


async def open_session(swarm: InProcessSwarm, peer: PeerId) -> Talk:
    talk = await talk_to(swarm, peer)
    await talk.open(model=swarm.model_id)
    return talk


async def states_seen(swarm: InProcessSwarm, model: str = "") -> list[ServerState]:
    view = await swarm.node.directory.view(model or swarm.model_id, NUM_BLOCKS)
    return [record.state for record in view.records.values()]


async def test_a_server_comes_serves_and_goes(llama: Path, swarm: InProcessSwarm) -> None:
    stages: list[str] = []
    progress: list[tuple[int, int]] = []
    watchers = Watchers(
        on_stage=stages.append, on_loading=lambda done, total: progress.append((done, total))
    )
    config = replace(swarm.server_config, blocks=BlockSpan(1, 4))
    async with Server(config, watchers, engine=swarm.net.engine) as server:
        assert server.info is not None and server.info.blocks == BlockSpan(1, 4)
        model, peer = server.info.model, server.info.peer_id
        view = await swarm.node.directory.view(model, NUM_BLOCKS)
        record = view.records[peer]
        assert (record.state, record.spans) == (ServerState.ONLINE, ((1, 4),))
        assert (record.public_name, record.dtype, record.quant) == ("somebody", "float32", None)
        assert record.inference_rps and record.throughput
        assert view.missing() == (BlockSpan(0, 1), BlockSpan(4, 5))
        channel = await swarm.node.open_channel(peer, BLOCKS_SERVICE)
        talk, text = Talk(channel, server.info.blocks), states(6, seed=3)
        await talk.open(model=model)
        (output,) = await talk.step(0, [0], [text])
        local = Span(load_blocks(str(llama), BlockSpan(1, 4)))
        assert_close(output, local.reference(text))
        await talk.close()
    assert [stage.split()[0] for stage in stages] == [
        *("Looking", "Joining", "Loading", "Online:", "Draining")
    ]
    assert progress[-1][0] == progress[-1][1] > 0
    assert await states_seen(swarm, model) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "petals-compute"]


async def test_the_directory_names_no_folder_of_ours(llama: Path, swarm: InProcessSwarm) -> None:
    await swarm.add(BlockSpan(0, 1))
    (summary,) = await swarm.node.directory.models()
    assert summary.repository == llama.name


async def test_a_leaving_server_serves_the_sessions_it_has_and_no_others(
    swarm: InProcessSwarm,
) -> None:
    peer = await swarm.add(BlockSpan(0, 2))
    talk = await open_session(swarm, peer)
    left = swarm.stop(peer)
    word, _ = await talk.channel.receive(5.0)
    assert isinstance(word, Draining)
    assert 50 < word.seconds <= 60
    assert await states_seen(swarm) == [ServerState.DRAINING]
    other = await talk_to(swarm, peer, b"o" * 16)
    refusal = await other.refused(other.opening(model=swarm.model_id))
    assert refusal.code == "peer_busy"
    await talk.step(0, [0], [torch.zeros(3, 32)])
    await talk.close()
    # Its last session has gone: it does not stay for those who only look on.
    await left
    with pytest.raises(PeerUnreachable):
        await other.channel.receive(5.0)


async def test_who_asks_twice_does_not_wait_for_sessions(swarm: InProcessSwarm) -> None:
    peer = await swarm.add(BlockSpan(0, 2))
    talk = await open_session(swarm, peer)
    swarm.stop(peer)
    assert isinstance((await talk.channel.receive(5.0))[0], Draining)
    left = swarm.stop(peer)
    assert isinstance((await talk.channel.receive(5.0))[0], SessionEnded)
    await left


async def test_nobody_stays_for_clients_that_have_hung_up(swarm: InProcessSwarm) -> None:
    peer = await swarm.add(BlockSpan(0, 2))
    talk = await open_session(swarm, peer)
    await talk.channel.close()
    await swarm.stop(peer)


async def test_a_server_whose_compute_thread_fails_leaves(
    swarm: InProcessSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(swarm.server_config, blocks=BlockSpan(0, 2))
    with pytest.raises(PeerFailed, match="compute thread has failed"):
        async with Server(config, engine=swarm.net.engine) as server:
            assert server.info is not None
            model = server.info.model
            channel = await swarm.node.open_channel(server.info.peer_id, BLOCKS_SERVICE)
            talk = Talk(channel, server.info.blocks)
            await talk.open(model=model)
            monkeypatch.setattr(Scheduler, "ran", lambda *portions: 1 // 0)
            step = Step(RequestHeader(talk.session_id, 0, 0), (0,), (3,))
            assert (await talk.refused(step, torch.zeros(3, 32))).code == "peer_failed"
            with pytest.raises(PeerUnreachable):
                while True:
                    await channel.receive(10.0)
    assert await states_seen(swarm, model) == []


async def test_servers_that_start_together_do_not_all_choose_the_same(
    swarm: InProcessSwarm,
) -> None:
    peers = await asyncio.gather(*(swarm.add(num_blocks=2) for _ in range(2)))
    spans = {swarm.info(peer).blocks for peer in peers}
    assert spans == {BlockSpan(0, 2), BlockSpan(2, 4)}


async def test_stopping_a_start_leaves_nothing(swarm: InProcessSwarm) -> None:
    joining = asyncio.Event()

    def on_stage(text: str) -> None:
        if text.startswith("Loading"):
            joining.set()

    config = replace(swarm.server_config, blocks=BlockSpan(0, 5))
    server = Server(config, Watchers(on_stage=on_stage), engine=swarm.net.engine)
    task = asyncio.create_task(server.run())
    await joining.wait()
    model = (await swarm.node.directory.models())[0].model
    assert await states_seen(swarm, model) == [ServerState.JOINING]
    server.stop()
    await task
    assert await states_seen(swarm, model) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source": SourceConfig(model="no/such folder")}, ModelNotFound),
        ({"span": BlockSpan(3, 9)}, BlocksNotServed),
        ({"compute": ComputeConfig(device="cuda")}, ConfigError),
    ],
)
async def test_what_cannot_start_says_why(
    swarm: InProcessSwarm, changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        await swarm.add(**changes)
    assert caught.value.hint
    assert await swarm.node.directory.models() == ()


@pytest.mark.parametrize("allow_training", [True, False])
async def test_whether_it_trains_is_announced(swarm: InProcessSwarm, allow_training: bool) -> None:
    peer = await swarm.add(BlockSpan(0, 1), limits=LimitsConfig(allow_training=allow_training))
    view = await swarm.node.directory.view(swarm.model_id, NUM_BLOCKS)
    assert view.records[peer].trains == allow_training
