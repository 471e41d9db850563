"""A running server goes to the blocks that need it more, and takes nobody's session down."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch

from petals.server.config import AnnounceConfig, MovingConfig
from petals.server.policies import MovePolicy
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
LEFT, RIGHT = BlockSpan(0, 2), BlockSpan(3, 5)


async def add_restless(swarm: RealSwarm, moving: MovingConfig) -> PeerId:
    """A server that chooses its blocks itself."""
    announce = AnnounceConfig(throughput=30.0)
    return await swarm.add(num_blocks=2, moving=moving, announce=announce)


async def states_of(swarm: RealSwarm) -> dict[PeerId, tuple[ServerState, tuple[BlockSpan, ...]]]:
    view = await swarm.node.directory.view(swarm.model_id, NUM_BLOCKS, whole=True)
    return {peer: (record.state, record.block_spans) for peer, record in view.records.items()}


async def becomes(swarm: RealSwarm, peer: PeerId, state: ServerState) -> None:
    while True:
        if (await states_of(swarm))[peer][0] is state:
            return
        await asyncio.sleep(0.02)


async def one_is_at(swarm: RealSwarm, blocks: BlockSpan, *peers: PeerId) -> None:
    while True:
        if blocks in {swarm.info(peer).blocks for peer in peers}:
            return
        await asyncio.sleep(0.02)


async def add(swarm: RealSwarm, span: BlockSpan, throughput: float) -> PeerId:
    return await swarm.add(span, announce=AnnounceConfig(throughput=throughput))


@asynccontextmanager
async def a_story(swarm: RealSwarm) -> AsyncIterator[Story]:
    story = Story.begin(swarm, swarm.connection())
    try:
        yield story
    finally:
        await story.session.close()


async def decode_in_place(story: Story) -> None:
    """A token each, at a place where there is always room for it."""
    await story.step([9, 9], [torch.ones(1, HIDDEN), torch.zeros(1, HIDDEN)])


async def test_one_of_three_moves_and_sessions_go_on(bloom: Path) -> None:
    async with real_swarm(bloom, client=PATIENT) as swarm:
        restless = await add_restless(swarm, EAGER)
        assert swarm.info(restless).blocks == LEFT
        await add(swarm, BlockSpan(2, 5), 30.0)
        async with a_story(swarm) as story:
            session = story.session
            await story.prefill()
            assert restless in story.peers
            # Only now are there two who can take its place: the right end is the weaker one then.
            others = [await add(swarm, BlockSpan(0, 3), 300.0) for _ in range(2)]
            while len(swarm.infos(restless)) < 2:
                await decode_in_place(story)
            assert swarm.info(restless).blocks == RIGHT
            assert (await states_of(swarm))[restless] == (ServerState.ONLINE, (RIGHT,))
            assert restless not in story.peers
            assert {repair.reason for repair in session.trace.repairs} == {"The server leaves."}
            await story.reorder()
            await story.decode()
        # A session that is opened now may be served by it again.
        await swarm.stop(swarm.peers[1])
        async with a_story(swarm) as story:
            await story.prefill()
            assert [peer in others for peer in story.peers] == [True, False]
            assert restless in story.peers


async def test_it_stays_if_nobody_would_hold_its_blocks(bloom: Path) -> None:
    """Those it relied on die while it waits to be heard."""
    async with real_swarm(bloom) as swarm:
        peer = await add_restless(swarm, replace(EAGER, propagation_seconds=1.0))
        await add(swarm, BlockSpan(2, 5), 30.0)
        strong = [await add(swarm, BlockSpan(0, 3), 300.0) for _ in range(2)]
        await becomes(swarm, peer, ServerState.DRAINING)
        for other in strong:
            swarm.kill(other)
        await becomes(swarm, peer, ServerState.ONLINE)
        assert (await states_of(swarm))[peer] == (ServerState.ONLINE, (LEFT,))
        assert len(swarm.infos(peer)) == 1


RARELY = MovingConfig(
    policy=MovePolicy(look_seconds=600.0, gap_seconds=0.2, seconds_between_looks=0.05)
)
"""Looks for load every ten minutes; times of gaps are a 25th of the defaults."""


async def test_a_gap_is_filled_at_once_whatever_the_period(bloom: Path) -> None:
    async with real_swarm(bloom) as swarm:
        restless = await add_restless(swarm, RARELY)
        right = await add(swarm, RIGHT, 30.0)
        await add(swarm, BlockSpan(0, 3), 30.0)
        await swarm.stop(right)
        async with asyncio.timeout(10.0):  # without the rule: 600 s and 45 s
            await one_is_at(swarm, RIGHT, restless)
        assert swarm.info(restless).blocks == RIGHT


async def test_of_two_holders_one_goes_to_a_gap_and_one_stays(bloom: Path) -> None:
    """Each would leave its blocks to the other."""
    async with real_swarm(bloom) as swarm:
        middle = await add(swarm, BlockSpan(2, 3), 30.0)
        first = await add_restless(swarm, RARELY)
        right = await add(swarm, RIGHT, 300.0)
        second = await add_restless(swarm, RARELY)
        assert swarm.info(first).blocks == swarm.info(second).blocks == LEFT
        await swarm.stop(right)
        async with asyncio.timeout(20.0):
            await one_is_at(swarm, RIGHT, first, second)
        states = await states_of(swarm)
        spans = [span for peer in (middle, first, second) for span in states[peer][1]]
        assert sorted(spans) == [LEFT, BlockSpan(2, 3), RIGHT]


async def test_who_may_not_move_stays(bloom: Path) -> None:
    async with real_swarm(bloom) as swarm:
        peer = await add_restless(swarm, replace(EAGER, enabled=False))
        await add(swarm, BlockSpan(2, 5), 30.0)
        await add(swarm, BlockSpan(0, 3), 300.0)
        await add(swarm, BlockSpan(0, 3), 300.0)
        # Six looks of one that may move.
        await asyncio.sleep(6 * EAGER.policy.look_seconds)
        assert (await states_of(swarm))[peer] == (ServerState.ONLINE, (LEFT,))
