"""Opening a route: whole or not at all, around the full, the failed, the unfit; never for ever."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.errors import (
    AdmissionDenied,
    BadInput,
    BlocksNotServed,
    CacheFull,
    LengthExceeded,
    MissingBlocksError,
    PeerFailed,
    PeerUnreachable,
    PetalsError,
    RequestTooLarge,
    UnknownAdapter,
)
from petals.swarm.transport import Stream
from petals.types import BlockSpan, Hop, PeerId, ServerState
from petals.wire.requests import GetInfo, OpenSession
from support import service
from support.models import WIDTH, random_adapter
from support.reference import assert_close, states
from support.service import Served, Worker

HALVES = ((0, 2), (2, 4))
WHOLE = (0, 4)
ONE_SESSION = {"num_tokens": 32}
"""Room for one session of 20 tokens."""


def split(*spans: tuple[int, int], **options: Any) -> AbstractAsyncContextManager[Served]:
    return service.split(*spans, num_blocks=4, **options)


async def opened(
    swarm: Served,
    connection: SwarmConnection | None = None,
    *,
    blocks: BlockSpan | None = None,
    **options: Any,
) -> SessionRows:
    """A session of one row that holds one token."""
    session = swarm.session(connection, blocks=blocks, **options)
    await session.step(states(1), (0,), (1,))
    return session


@pytest.mark.parametrize(("spans", "missing"), [([], "0:4"), ([(0, 2)], "2:4")])
async def test_missing_blocks_are_named_and_nothing_is_held(
    spans: list[tuple[int, int]], missing: str
) -> None:
    async with split(*spans) as swarm:
        with pytest.raises(MissingBlocksError, match=f"{missing} of tiny"):
            await opened(swarm)
        assert not any(swarm.num_asked(OpenSession))


@pytest.mark.parametrize("state", [ServerState.JOINING, ServerState.DRAINING, ServerState.OFFLINE])
async def test_only_servers_that_are_online_count(state: ServerState) -> None:
    async with split(WHOLE) as swarm:
        await swarm.workers[0].announce(state=state)
        with pytest.raises(MissingBlocksError):
            await opened(swarm)


async def test_a_server_that_joined_since_is_found() -> None:
    async with split(HALVES[0]) as swarm:
        connection = swarm.connection(fresh_seconds=0.0)
        await (await connection.view()).records()
        await swarm.add(2, 4)
        await opened(swarm, connection)


async def test_allowed_and_blocked_servers() -> None:
    async with split(WHOLE, WHOLE) as swarm:
        one, other = (worker.peer_id for worker in swarm.workers)
        for options in ({"allowed_servers": [one]}, {"blocked_servers": [other]}):
            session = await opened(swarm, **options)
            assert [hop.peer_id for hop in session.trace.hops] == [one]
        with pytest.raises(MissingBlocksError):
            await opened(swarm, allowed_servers=[])


async def become_unfit(swarm: Served, server: Worker, how: str) -> None:
    match how:
        case "full":
            await opened(swarm, allowed_servers=[server.peer_id])
        case "dead":
            swarm.net.kill(server.peer_id)
        case "refuses":
            server.faults.refusals[OpenSession] = [LengthExceeded("Too long.") for _ in range(4)]


@pytest.mark.parametrize("how", ["full", "dead", "refuses", "of another width"])
async def test_a_server_that_cannot_take_the_session_is_passed_by(how: str) -> None:
    width = WIDTH + 1 if how == "of another width" else WIDTH
    async with split(WHOLE, hidden_size=width, **ONE_SESSION) as swarm:
        (unfit,) = swarm.workers
        await become_unfit(swarm, unfit, how)
        fit = await swarm.add(*WHOLE)
        connection = swarm.connection(alloc_timeout=0, max_pinged=0)
        for _ in range(4):
            session = await opened(swarm, connection)
            assert [hop.peer_id for hop in session.trace.hops] == [fit.peer_id]
            await session.close()
        banned = await swarm.banned(connection)
        assert banned <= ({unfit.peer_id} if how == "dead" else set())


@pytest.mark.parametrize(
    ("error", "options", "says", "num_asked"),
    [
        (RequestTooLarge("Never.", hint="Less."), {"alloc_timeout": 100}, "Never", [1]),
        (LengthExceeded("Too long."), {}, "says: Too long", [1]),
        (AdmissionDenied("No key."), {}, "No key", [1]),
        (PeerFailed("Broken."), {"max_retries": 0}, "Broken", [1]),
        (PeerFailed("Broken."), {"max_retries": 2}, "Broken", [3]),
        (BadInput("You."), {}, "says: You", [1, 1]),
    ],
)
async def test_what_every_server_refuses_is_told_as_soon_as_nothing_else_can_help(
    error: PetalsError, options: dict[str, object], says: str, num_asked: list[int]
) -> None:
    async with split(*[WHOLE] * len(num_asked)) as swarm:
        for worker in swarm.workers:
            worker.faults.refusals[OpenSession] = [error] * 10
        with pytest.raises(type(error), match=says):
            await opened(swarm, **options)
        assert swarm.num_asked(OpenSession) == num_asked


async def test_a_server_of_another_width_says_so() -> None:
    async with split(WHOLE, hidden_size=WIDTH + 1) as swarm:
        with pytest.raises(BadInput, match=f"says: .* {WIDTH + 1} values, not {WIDTH}"):
            await opened(swarm)
        await swarm.at_rest()


async def test_an_unreachable_swarm_of_one() -> None:
    async with split(WHOLE) as swarm:
        swarm.net.kill(swarm.workers[0].peer_id)
        with pytest.raises(PeerUnreachable):
            await opened(swarm, max_retries=1)


async def test_a_refusal_releases_what_the_others_had_granted() -> None:
    async with split(*HALVES, **ONE_SESSION) as swarm:
        head, tail = swarm.workers
        holder = await opened(swarm, blocks=BlockSpan(2, 4))
        with pytest.raises(CacheFull) as caught:
            await opened(swarm, alloc_timeout=0.1)
        assert caught.value.peer_id == tail.peer_id
        assert swarm.num_asked(OpenSession)[0] == 1
        await head.at_rest()
        await holder.close()


async def test_waiting_for_room_holds_nothing_elsewhere() -> None:
    async with split(*HALVES, **ONE_SESSION) as swarm:
        head, tail = swarm.workers
        connection = swarm.connection()
        holder = await opened(swarm, connection, blocks=BlockSpan(2, 4))
        waiting = asyncio.create_task(opened(swarm, connection))
        await tail.faults.until_asked(OpenSession, 3)
        await head.at_rest()
        other = await opened(swarm, connection, blocks=BlockSpan(0, 2))
        await other.close()
        await holder.close()
        session = await waiting
        output = await session.step(states(3), (0,), (3,))
        assert_close(output, swarm.expected(states(3)))
        await session.close()
        await swarm.at_rest()


async def test_an_interrupted_opening_holds_nothing() -> None:
    async with split(*HALVES, **ONE_SESSION) as swarm:
        holder = await opened(swarm, blocks=BlockSpan(2, 4))
        waiting = asyncio.create_task(opened(swarm))
        await swarm.workers[1].faults.until_asked(OpenSession, 3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await holder.close()
        await swarm.at_rest()


async def test_crossed_routes_over_pools_of_one_session() -> None:
    """Many clients want both servers at once; each gets them in the end, nobody holds and waits."""
    async with split(*HALVES, **ONE_SESSION) as swarm:

        async def client() -> None:
            session = await opened(swarm, alloc_timeout=30)
            await session.close()

        async with asyncio.timeout(30):
            await asyncio.gather(*(client() for _ in range(6)))
        await swarm.at_rest()


async def test_the_dead_are_not_dialled_while_their_ban_lasts_whatever_their_record_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with split(*HALVES) as swarm:
        connection = swarm.connection()
        session = await opened(swarm, connection)
        view, dead = await connection.view(), swarm.workers[1].peer_id
        spare = await swarm.add(2, 4)
        await view.refresh()
        swarm.net.kill(dead)
        await session.step(states(1), (1,), (1,))
        dialled, dial = [], swarm.client.transport.open_stream

        async def note(peer: PeerId, protocol: str, timeout: float) -> Stream:
            dialled.append(peer)
            return await dial(peer, protocol, timeout)

        monkeypatch.setattr(swarm.client.transport, "open_stream", note)
        await view.refresh()
        assert dead in (await view.records()).records
        await view.warm_spares((Hop(spare.peer_id, BlockSpan(2, 4)),))
        swarm.net.kill(spare.peer_id)
        with pytest.raises(MissingBlocksError):
            await session.step(states(1), (2,), (1,))
        again = await swarm.add(2, 4)
        await session.step(states(1), (2,), (1,))
        assert again.peer_id in dialled
        assert dead not in dialled


async def test_a_repair_does_not_wait_for_the_directory() -> None:
    async with split(*HALVES) as swarm:
        connection = swarm.connection(update_period=1e-6)
        session = await opened(swarm, connection)
        await swarm.add(2, 4)
        await (await connection.view()).refresh()
        asked = swarm.silence_directory()
        swarm.net.kill(swarm.workers[1].peer_id)
        await session.step(states(1), (1,), (1,))
        assert asked.is_set()


async def test_who_has_answered_before_may_take_no_longer_to_connect_than_to_be_silent() -> None:
    async with split(WHOLE) as swarm:
        view = await swarm.connection(connect_timeout=5.0, silence_timeout=3.0).view()
        peer = swarm.workers[0].peer_id
        assert view.connect_seconds(peer) == 5.0
        await view.records()
        await view.measure([peer])
        assert view.connect_seconds(peer) == 3.0
        quick = await swarm.connection(connect_timeout=1.0).view()
        assert quick.connect_seconds(peer) == 1.0


async def test_one_that_was_only_slow_to_answer_is_called_when_nobody_else_serves() -> None:
    async with split(*HALVES) as swarm:
        long = {"ban_timeout": 600.0, "repair_timeout": 20.0}
        connection = swarm.connection(ping_timeout=0.1, **long)
        session = await opened(swarm, connection)
        spare = (await swarm.add(2, 4)).peer_id
        view = await connection.view()
        await view.refresh()
        swarm.net.pause(spare)
        await view.measure([spare])
        assert await swarm.banned(connection) == {spare}
        swarm.net.resume(spare)
        swarm.net.kill(swarm.workers[1].peer_id)
        await session.step(states(1), (1,), (1,))
        assert await swarm.banned(connection) == {swarm.workers[1].peer_id}


async def test_a_server_that_moved_is_looked_up_again() -> None:
    async with split(WHOLE) as swarm:
        (moved,) = swarm.workers
        connection = swarm.connection()
        await (await connection.view()).records()
        moved.faults.refusals[OpenSession] = [BlocksNotServed("Not here.") for _ in range(9)]
        with pytest.raises(BlocksNotServed):
            await opened(swarm, connection)
        moved.faults.refusals.clear()
        await moved.announce(spans=(HALVES[0],))
        await swarm.add(2, 4)
        await (await connection.view()).refresh()
        assert len((await opened(swarm, connection)).trace.hops) == 2


async def test_an_adapter_is_asked_for_where_it_is() -> None:
    async with split(WHOLE) as swarm:
        with pytest.raises(UnknownAdapter, match="poems") as caught:
            await opened(swarm, active_adapter="poems")
        assert "--adapters poems" in caught.value.hint
        owner = await swarm.add(*WHOLE)
        owner.service.adapters.preload("poems", random_adapter(range(4)))
        await owner.announce(adapters=("poems",))
        await opened(swarm, active_adapter="poems")
        (opening,) = owner.faults.all(OpenSession)
        assert opening.adapter == "poems"


async def test_holders_of_the_same_blocks_are_measured() -> None:
    async with split(WHOLE, WHOLE) as swarm:
        view = await swarm.connection().view()
        await view.refresh()
        measured = [one for one in view.candidates() if one.round_trip_seconds is not None]
        assert len(measured) == 2
        # 1024 tokens in each of four blocks.
        assert all(one.tokens_free == 4 * 1024 for one in measured)
        assert swarm.num_asked(GetInfo) == [1, 1]
