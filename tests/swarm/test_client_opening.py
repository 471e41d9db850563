"""Opening a route: whole or not at all, around the full, the failed, the unfit; never for ever."""

import asyncio

import pytest
import torch

from petals.client.routing.bans import Bans, Cause
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
    RequestTooLarge,
    UnknownAdapter,
)
from petals.swarm.transport import Stream
from petals.types import BlockSpan, Hop, PeerId, ServerState
from support import fake_server
from support.fake_server import HIDDEN, expected, states, toy_swarm

ALL = BlockSpan(0, 4)


async def open_one(access: SwarmConnection, blocks: BlockSpan = ALL) -> SessionRows:
    return await fake_server.open_one(access, blocks)


async def test_a_model_that_nobody_serves() -> None:
    async with toy_swarm() as swarm:
        with pytest.raises(MissingBlocksError, match="0:4 of toy"):
            await open_one(swarm.access(4))


async def test_missing_blocks_are_named_and_nothing_is_held() -> None:
    async with toy_swarm((0, 2)) as swarm:
        with pytest.raises(MissingBlocksError, match="2:4 of toy"):
            await open_one(swarm.access(4))
        assert not swarm.servers[0].opened


@pytest.mark.parametrize("state", [ServerState.JOINING, ServerState.DRAINING, ServerState.OFFLINE])
async def test_only_servers_that_are_online_count(state: ServerState) -> None:
    async with toy_swarm((0, 4)) as swarm:
        await swarm.servers[0].announce(state=state)
        with pytest.raises(MissingBlocksError):
            await open_one(swarm.access(4))


async def test_a_server_that_joined_since_is_found() -> None:
    async with toy_swarm((0, 2)) as swarm:
        access = swarm.access(4, fresh_seconds=0.0)
        await (await access.view()).records()
        await swarm.add(2, 4)
        session = await open_one(access)
        await session.close()


async def test_allowed_and_blocked_servers() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        one, other = (server.peer_id for server in swarm.servers)
        for options in ({"allowed_servers": [one]}, {"blocked_servers": [other]}):
            session = await open_one(swarm.access(4, **options))
            assert [hop.peer_id for hop in session.trace.hops] == [one]
            await session.close()
        with pytest.raises(MissingBlocksError):
            await open_one(swarm.access(4, allowed_servers=[]))


async def test_a_full_server_is_passed_by() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        full, free = swarm.servers
        full.max_sessions = 0
        for _ in range(4):
            session = await open_one(swarm.access(4, alloc_timeout=0))
            assert [hop.peer_id for hop in session.trace.hops] == [free.peer_id]
            await session.close()


async def test_a_refusal_releases_what_the_others_had_granted() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        swarm.servers[1].max_sessions = 0
        with pytest.raises(CacheFull) as caught:
            await open_one(swarm.access(4, alloc_timeout=0.1))
        assert caught.value.peer_id == swarm.servers[1].peer_id
        assert len(swarm.servers[0].opened) == 1
        assert await swarm.at_rest()


async def test_waiting_for_room_holds_nothing_elsewhere() -> None:
    async with toy_swarm((0, 2), (2, 4), max_sessions=1) as swarm:
        access = swarm.access(4)
        tail = await open_one(access, BlockSpan(2, 4))
        waiting = asyncio.create_task(open_one(access))
        await swarm.servers[1].until_opened(3)
        assert not swarm.servers[0].sessions
        head = await open_one(access, BlockSpan(0, 2))
        await head.close()
        await tail.close()
        session = await waiting
        text = states(3)
        output = await session.step(text, (0,), (3,))
        torch.testing.assert_close(output, expected(text, ALL))
        await session.close()
        assert await swarm.at_rest()


async def test_crossed_routes_over_pools_of_one_session() -> None:
    """Many clients want both servers at once; each gets them in the end, nobody holds and waits."""
    async with toy_swarm((0, 2), (2, 4), max_sessions=1) as swarm:

        async def client() -> None:
            session = await open_one(swarm.access(4, alloc_timeout=30))
            await session.step(states(2), (0,), (2,))
            await session.close()

        async with asyncio.timeout(30):
            await asyncio.gather(*(client() for _ in range(6)))
        assert await swarm.at_rest()


async def test_what_never_fits_is_said_at_once() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].refuse_opens.append(RequestTooLarge("Never.", hint="Less."))
        with pytest.raises(RequestTooLarge):
            await open_one(swarm.access(4, alloc_timeout=100))
        assert len(swarm.servers[0].opened) == 1


async def test_what_one_server_refuses_another_may_take() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        access = swarm.access(4)
        for server in swarm.servers:
            server.refuse_opens.append(LengthExceeded("Too long."))
        with pytest.raises(LengthExceeded):
            await open_one(access)
        swarm.servers[0].refuse_opens.append(LengthExceeded("Too long."))
        for _ in range(4):
            session = await open_one(access)
            await session.close()
        view = await access.view()
        assert not view.bans.at(swarm.client.clock.monotonic())


async def test_what_all_servers_refuse_is_told_as_the_last_ones_words() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        for server in swarm.servers:
            server.refuse_opens.append(BadInput("You."))
        with pytest.raises(BadInput, match="says: You"):
            await open_one(swarm.access(4))
        assert [len(server.opened) for server in swarm.servers] == [1, 1]


@pytest.mark.parametrize("is_alone", [False, True])
async def test_a_server_of_another_width_is_passed_by(is_alone: bool) -> None:
    async with toy_swarm((0, 4), hidden_size=HIDDEN + 1) as swarm:
        if is_alone:
            with pytest.raises(BadInput, match=f"says: .* {HIDDEN + 1} values, not {HIDDEN}"):
                await open_one(swarm.access(4))
        else:
            await swarm.add(0, 4)
            for _ in range(4):
                session = await open_one(swarm.access(4))
                assert session.trace.hops[0].peer_id == swarm.servers[1].peer_id
                await session.close()
        assert await swarm.at_rest()


async def test_a_server_that_failed_is_avoided() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        dead, alive = swarm.servers
        swarm.net.kill(dead.peer_id)
        access = swarm.access(4, max_pinged=0)
        for _ in range(4):
            session = await open_one(access)
            assert session.trace.hops[0].peer_id == alive.peer_id
            await session.close()


async def test_the_dead_are_not_dialled_while_their_ban_lasts_whatever_their_record_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        access = swarm.access(4)
        session = await open_one(access)
        spare = await swarm.add(2, 4)
        view = await access.view()
        await view.refresh()
        dead = swarm.servers[1]
        swarm.net.kill(dead.peer_id)
        await session.step(states(1), (0,), (1,))
        dialled, dial = [], swarm.client.transport.open_stream

        async def dials(peer: PeerId, protocol: str, timeout: float) -> Stream:
            dialled.append(peer)
            return await dial(peer, protocol, timeout)

        monkeypatch.setattr(swarm.client.transport, "open_stream", dials)
        await view.refresh()
        assert dead.peer_id in (await view.records()).records
        await view.measure(view._worth_measuring())
        await view.warm_spares((Hop(spare.peer_id, BlockSpan(2, 4)),))
        swarm.net.kill(spare.peer_id)
        with pytest.raises(MissingBlocksError):
            await session.step(states(1), (1,), (1,))
        again = await swarm.add(2, 4)
        await session.step(states(1), (1,), (1,))
        assert again.peer_id in dialled
        assert dead.peer_id not in dialled
        await session.close()


async def test_a_repair_does_not_wait_for_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        access = swarm.access(4, update_period=1e-6)
        session = await open_one(access)
        await swarm.add(2, 4)
        await (await access.view()).refresh()
        asked = swarm.hush_directory(monkeypatch)
        swarm.net.kill(swarm.servers[1].peer_id)
        await session.step(states(1), (0,), (1,))
        assert asked.is_set()
        await session.close()


async def test_who_has_answered_before_may_take_no_longer_to_connect_than_to_be_silent() -> None:
    async with toy_swarm((0, 4)) as swarm:
        access = swarm.access(4, connect_timeout=5.0, silence_timeout=3.0)
        view, peer = await access.view(), swarm.servers[0].peer_id
        assert view.connect_seconds(peer) == 5.0
        await view.records()
        await view.measure([peer])
        assert view.connect_seconds(peer) == 3.0
        assert (await swarm.access(4, connect_timeout=1.0).view()).connect_seconds(peer) == 1.0


async def test_one_that_was_only_slow_to_answer_is_called_when_nobody_else_serves() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        long = {"ban_timeout": 600.0, "repair_timeout": 20.0}
        access = swarm.access(4, ping_timeout=0.1, **long)
        session = await open_one(access)
        spare = await swarm.add(2, 4)
        view, clock = await access.view(), swarm.client.clock
        await view.refresh()
        swarm.net.pause(spare.peer_id)
        await view.measure([spare.peer_id])
        assert view.bans.at(clock.monotonic()) == {spare.peer_id}
        swarm.net.resume(spare.peer_id)
        swarm.net.kill(swarm.servers[1].peer_id)
        await session.step(states(1), (0,), (1,))
        assert view.bans.at(clock.monotonic()) == {swarm.servers[1].peer_id}
        await session.close()


@pytest.mark.parametrize(("max_retries", "attempts"), [(0, 1), (2, 3)])
async def test_retries_end(max_retries: int, attempts: int) -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].refuse_opens += [PeerFailed("Broken.")] * 10
        with pytest.raises(PeerFailed):
            await open_one(swarm.access(4, max_retries=max_retries))
        assert len(swarm.servers[0].opened) == attempts


async def test_an_unreachable_swarm_of_one() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.net.kill(swarm.servers[0].peer_id)
        with pytest.raises(PeerUnreachable):
            await open_one(swarm.access(4, max_retries=1))


async def test_the_wrong_key_is_not_retried() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].refuse_opens.append(AdmissionDenied("No key."))
        with pytest.raises(AdmissionDenied):
            await open_one(swarm.access(4))
        assert len(swarm.servers[0].opened) == 1


async def test_a_server_that_moved_is_looked_up_again() -> None:
    async with toy_swarm((0, 4)) as swarm:
        moved = swarm.servers[0]
        access = swarm.access(4)
        await (await access.view()).records()
        moved.blocks = BlockSpan(0, 2)
        await swarm.add(2, 4)
        with pytest.raises(BlocksNotServed):
            await open_one(access)
        await moved.announce()
        await (await access.view()).refresh()
        session = await open_one(access)
        assert len(session.trace.hops) == 2
        await session.close()


async def test_an_adapter_is_asked_for_where_it_is() -> None:
    async with toy_swarm((0, 4)) as swarm:
        with pytest.raises(UnknownAdapter, match="poems") as caught:
            await open_one(swarm.access(4, active_adapter="poems"))
        assert "--adapters poems" in caught.value.hint
        await swarm.add(0, 4, adapters=("poems",))
        session = await open_one(swarm.access(4, active_adapter="poems"))
        assert swarm.servers[1].opened[0].adapter == "poems"
        await session.close()


async def test_the_measured_are_preferred() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        view = await swarm.access(4).view()
        await view.refresh()
        measured = [one for one in view.candidates() if one.round_trip_seconds is not None]
        assert len(measured) == 2
        assert all(one.tokens_free == 4 * 10**6 for one in measured)


async def test_an_interrupted_opening_holds_nothing() -> None:
    async with toy_swarm((0, 2), (2, 4), max_sessions=1) as swarm:
        tail = await open_one(swarm.access(4), BlockSpan(2, 4))
        waiting = asyncio.create_task(open_one(swarm.access(4)))
        await swarm.servers[1].until_opened(3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await tail.close()
        assert await swarm.at_rest()


def test_bans_double_and_are_forgotten() -> None:
    bans, peer = Bans(10.0, 3600.0), PeerId("Qm")
    assert bans.add(peer, 0.0).until == 10.0
    assert bans.at(9.0) == {peer}
    assert not bans.at(10.0)
    assert bans.add(peer, 5.0).until == 15.0
    assert bans.add(peer, 20.0).until == 40.0
    assert bans.add(peer, 100.0).until == 110.0
    bans.lift(peer)
    assert not bans.at(101.0)
    assert bans.add(peer, 102.0).until == 112.0


def test_the_worst_cause_of_a_ban_counts() -> None:
    bans, peer = Bans(10.0, 3600.0), PeerId("Qm")
    bans.add(peer, 0.0, cause=Cause.SLOW)
    assert bans.at(1.0) and not bans.at(1.0, Cause.UNANSWERED)
    bans.add(peer, 1.0, cause=Cause.FAILED)
    bans.add(peer, 2.0, cause=Cause.UNANSWERED)
    assert bans.at(3.0, Cause.FAILED) == {peer}
    bans.add(peer, 15.0, cause=Cause.SLOW)
    assert bans.at(16.0) and not bans.at(16.0, Cause.UNANSWERED)
