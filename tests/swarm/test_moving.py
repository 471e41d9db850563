"""A running server goes to the blocks that need it more, and takes nobody's session down."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petals.server.config import AnnounceConfig, MovingConfig
from petals.server.policies import MovePolicy
from petals.server.server import OnlineInfo, Server, Watchers
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId, ServerState
from support.session_script import IMPATIENT, Story
from support.swarm import HIDDEN, NUM_BLOCKS, RealSwarm, real_swarm

PATIENT = IMPATIENT | {"silence_timeout": 10.0, "repair_timeout": 20.0}
EAGER = MovingConfig(
    policy=MovePolicy(
        look_seconds=0.2,
        seconds_between_looks=0.0,
        confirm_seconds=0.1,
        turn_seconds=0.1,
        min_stay_seconds=0.0,
    ),
    propagation_seconds=0.2,
)
RIGHT = BlockSpan(3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


class Restless:
    """A server that chose its blocks itself, and where it has been online."""

    def __init__(self, swarm: RealSwarm, moving: MovingConfig) -> None:
        self.stays: list[OnlineInfo] = []
        self.online = asyncio.Event()
        config = replace(
            swarm.base,
            num_blocks=2,
            moving=moving,
            announce=AnnounceConfig(throughput=30.0),
        )
        self.server = Server(config, Watchers(on_online=self._on_online), engine=swarm.net.engine)
        self.life = asyncio.create_task(self.server.run())

    def _on_online(self, info: OnlineInfo) -> None:
        self.stays.append(info)
        self.online.set()

    async def is_online(self, times: int) -> None:
        while len(self.stays) < times:
            self.online.clear()
            await self.online.wait()

    async def leave(self) -> None:
        self.server.stop()
        await self.life


async def states_of(swarm: RealSwarm) -> dict[PeerId, tuple[ServerState, tuple[BlockSpan, ...]]]:
    assert swarm.client is not None
    view = await swarm.client.directory.view(swarm.model, NUM_BLOCKS, whole=True)
    return {peer: (record.state, record.block_spans) for peer, record in view.records.items()}


async def becomes(swarm: RealSwarm, peer: PeerId, state: ServerState) -> None:
    assert swarm.client is not None
    while True:
        if (await states_of(swarm))[peer][0] is state:
            return
        await asyncio.sleep(0.02)


async def add(swarm: RealSwarm, span: BlockSpan, throughput: float) -> PeerId:
    swarm.base = replace(swarm.base, announce=AnnounceConfig(throughput=throughput))
    return await swarm.add(span)


async def decode_in_place(story: Story) -> None:
    """A token each, at a place where there is always room for it."""
    await story.step([9, 9], [torch.ones(1, HIDDEN), torch.zeros(1, HIDDEN)])


async def test_one_of_three_moves_and_sessions_go_on(folder: Path) -> None:
    async with real_swarm(folder) as swarm:
        restless = Restless(swarm, EAGER)
        await restless.is_online(1)
        assert restless.stays[0].blocks == BlockSpan(0, 2)
        await add(swarm, BlockSpan(2, 5), 30.0)
        access = swarm.access(**PATIENT)
        story = Story.begin(swarm, access)
        session = story.session
        await story.prefill()
        assert restless.stays[0].peer_id in {hop.peer_id for hop in session.trace.hops}
        # Only now are there two who can take its place: the right end is the weaker one then.
        await add(swarm, BlockSpan(0, 3), 300.0)
        await add(swarm, BlockSpan(0, 3), 300.0)
        while len(restless.stays) < 2:
            await decode_in_place(story)
        first, second = restless.stays
        assert (second.peer_id, second.blocks) == (first.peer_id, RIGHT)
        assert (await states_of(swarm))[first.peer_id] == (ServerState.ONLINE, (RIGHT,))
        assert first.peer_id not in {hop.peer_id for hop in session.trace.hops}
        assert {repair.reason for repair in session.trace.repairs} == {"The server leaves."}
        await story.reorder()
        await story.decode()
        await session.close()
        # Who comes now may be served by it again.
        await asyncio.gather(*(server.stop() or task for server, task in swarm.running[:1]))
        story = Story.begin(swarm, swarm.access(**PATIENT))
        again = story.session
        await story.prefill()
        assert first.peer_id in {hop.peer_id for hop in again.trace.hops}
        await again.close()
        await access.close()
        await restless.leave()


async def test_it_stays_if_nobody_would_hold_its_blocks(folder: Path) -> None:
    """Those it relied on die while it waits to be heard."""
    async with real_swarm(folder) as swarm:
        restless = Restless(swarm, replace(EAGER, propagation_seconds=1.0))
        await restless.is_online(1)
        peer = restless.stays[0].peer_id
        await add(swarm, BlockSpan(2, 5), 30.0)
        strong = [await add(swarm, BlockSpan(0, 3), 300.0) for _ in range(2)]
        await becomes(swarm, peer, ServerState.DRAINING)
        for other in strong:
            swarm.net.kill(other)
        await becomes(swarm, peer, ServerState.ONLINE)
        assert (await states_of(swarm))[peer] == (ServerState.ONLINE, (BlockSpan(0, 2),))
        assert len(restless.stays) == 1
        await restless.leave()


async def test_who_may_not_move_stays(folder: Path) -> None:
    async with real_swarm(folder) as swarm:
        restless = Restless(swarm, replace(EAGER, enabled=False))
        await restless.is_online(1)
        await add(swarm, BlockSpan(2, 5), 30.0)
        await add(swarm, BlockSpan(0, 3), 300.0)
        await add(swarm, BlockSpan(0, 3), 300.0)
        await asyncio.sleep(0.5)
        peer = restless.stays[0].peer_id
        assert (await states_of(swarm))[peer] == (ServerState.ONLINE, (BlockSpan(0, 2),))
        await restless.leave()
