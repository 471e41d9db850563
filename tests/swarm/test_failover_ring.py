"""States go from server to server; what cannot pass goes through the client; nothing is lost."""

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch

from petals.client.session import pipeline as path_module
from petals.client.session.pipeline import HopPipeline
from petals.client.session.rows import SessionRows
from petals.client.trace import Way
from petals.server.network import forwarding, peer_links
from petals.server.session.session import Session
from petals.testing.tiny_models import write_tiny_model
from petals.types import PeerId
from petals.wire.replies import ForwardFailed
from petals.wire.requests import Step
from support.service import assert_close
from support.session_script import IMPATIENT, SPANS, Fault, Story, strike
from support.swarm import ALL, HIDDEN, RealSwarm, real_swarm, states

LARGE = 1024
"""Bytes of a write that only states can fill: eight tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


class Traffic:
    """Bytes of large writes by (source, target)."""

    def __init__(self, swarm: RealSwarm) -> None:
        self.num_bytes: Counter[tuple[PeerId, PeerId]] = Counter()
        swarm.net.on_write = self._see

    def _see(self, source: PeerId, target: PeerId, num_bytes: int) -> None:
        if num_bytes > LARGE:
            self.num_bytes[source, target] += num_bytes

    @property
    def edges(self) -> set[tuple[PeerId, PeerId]]:
        return set(self.num_bytes)


class Heard(logging.Handler):
    """Set once somebody has logged what begins with ``words``."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words, self.event = words, asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.words):
            self.event.set()


async def logged(words: str) -> None:
    """Return once a repair has said what begins with ``words``."""
    heard, logger = Heard(words), logging.getLogger("petals.client.session.failover")
    logger.addHandler(heard)
    try:
        await heard.event.wait()
    finally:
        logger.removeHandler(heard)


def ring_of(session: SessionRows, client: PeerId) -> set[tuple[PeerId, PeerId]]:
    stops = [client, *(hop.peer_id for hop in session.trace.hops), client]
    return set(zip(stops, stops[1:]))


async def long_steps(session: SessionRows, swarm: RealSwarm) -> None:
    """A prefill in pieces, a long rollback and a reorder."""
    text, other = states(40, 1), states(16, 2)
    rows = [text[:32], text[:16]]
    output = await session.step(torch.cat(rows), (0, 0), (32, 16))
    torch.testing.assert_close(output[:32], swarm.expected(rows[0]), rtol=1e-4, atol=1e-5)
    output = await session.step(other, (16, 16), (8, 8), reorder=(1, 0))
    again = torch.cat([text[:16], other[8:]])
    torch.testing.assert_close(output[8:], swarm.expected(again)[16:], rtol=1e-4, atol=1e-5)


async def test_no_state_in_between_crosses_the_client(folder: Path) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT)
        session = SessionRows(access, ALL, max_length=60)
        traffic = Traffic(swarm)
        await long_steps(session, swarm)
        assert traffic.edges == ring_of(session, swarm.client.peer_id)
        assert {edge.way for edge in session.trace.edges} == {Way.DIRECT}
        assert all(len(hop.steps) == 4 for hop in session.trace.hops)
        await session.close()
        await access.close()


async def test_a_span_is_refilled_by_the_server_before_it(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, SPANS[1]) as swarm:
        access = swarm.access(**IMPATIENT)
        session = SessionRows(access, ALL, max_length=60)
        await long_steps(session, swarm)
        old, victim, last = (hop.peer_id for hop in session.trace.hops)
        swarm.net.kill(victim)
        traffic = Traffic(swarm)
        new = states(2, 9)
        await session.step(new, (24, 24), (1, 1))
        spare = session.trace.hops[1].peer_id
        assert [hop.peer_id for hop in session.trace.hops] == [old, spare, last]
        assert spare != victim
        assert traffic.edges == {(old, spare)}
        await session.close()
        await access.close()


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode", "rollback", "reorder"])
async def test_an_edge_that_is_cut_goes_through_the_client(
    folder: Path, phase: str, one_way: bool
) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, step_timeout=0.2)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await session.step(torch.empty(0, HIDDEN), (0, 0), (0, 0))
        one, two, three = (hop.peer_id for hop in session.trace.hops)
        await story.tell(phase, lambda: swarm.net.cut(two, three, one_way=one_way))
        trace = session.trace
        assert [hop.peer_id for hop in trace.hops] == [one, two, three]
        assert not trace.repairs
        assert Way.VIA_CLIENT in {edge.way for edge in trace.edges}
        await session.close()
        await access.close()


async def test_pieces_that_came_tell_how_long_the_others_may_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        note_progress = HopPipeline._note_progress

        def cut_first(path: HopPipeline, *progress: float) -> None:
            swarm.net.cut(path.hops[1].peer_id, path.hops[2].peer_id)
            note_progress(path, *progress)

        monkeypatch.setattr(HopPipeline, "_note_progress", cut_first)
        monkeypatch.setattr(path_module, "_UNMEASURED_FACTOR", 1e9)
        access = swarm.access(**IMPATIENT, step_timeout=0.2)
        session = SessionRows(access, ALL, max_length=60)
        prompt = states(96, 3)
        output = await session.step(prompt, (0, 0), (48, 48))
        assert_close(output, torch.cat([swarm.expected(row) for row in prompt.split(48)]))
        assert Way.VIA_CLIENT in {edge.way for edge in session.trace.edges}
        await session.close()
        await access.close()


async def test_a_first_prompt_does_not_wait_for_a_pace_that_nobody_has_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        monkeypatch.setattr(path_module, "_UNMEASURED_FACTOR", 1e9)
        monkeypatch.setattr(peer_links, "SILENCE_SECONDS", 0.5)
        access = swarm.access(**IMPATIENT)
        session = SessionRows(access, ALL, max_length=60)
        prompt = states(96, 3)

        def cut(source: PeerId, target: PeerId, num_bytes: int) -> None:
            if num_bytes > LARGE and source != swarm.client.peer_id:
                swarm.net.cut(source, target)
                swarm.net.on_write = lambda *write: None

        swarm.net.on_write = cut
        output = await session.step(prompt, (0, 0), (48, 48))
        assert_close(output, torch.cat([swarm.expected(row) for row in prompt.split(48)]))
        assert Way.VIA_CLIENT in {edge.way for edge in session.trace.edges}
        assert not session.trace.repairs
        await session.close()
        await access.close()


async def test_a_server_that_cries_loss_and_never_answers_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_swarm(folder, *SPANS, SPANS[0]) as swarm:
        hand_on, cries = forwarding.StepForwarder._deliver_inbound, []

        async def cry(
            self: forwarding.StepForwarder, served: Session, step: Step, *output: object
        ) -> None:
            peer = self._parts.node.peer_id
            if peer not in cries[:1] or len(cries) > 50:
                await hand_on(self, served, step, *output)
            else:
                cries.append(peer)
                await served.tell(ForwardFailed(step.session_id, step.epoch, step.step_id))

        monkeypatch.setattr(forwarding.StepForwarder, "_deliver_inbound", cry)
        access = swarm.access(**IMPATIENT, request_timeout=1.0)
        session = SessionRows(access, ALL, max_length=40)
        prompt = states(8, 3)
        await session.step(prompt[:4], (0,), (4,))
        cries.append(session.trace.hops[0].peer_id)
        await session.step(prompt[4:], (4,), (4,))
        assert len(cries) < 5
        assert [repair.peer_id for repair in session.trace.repairs] == cries[:1]
        await session.close()
        await access.close()


async def test_a_server_that_slept_through_its_repair_changes_nothing(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        sleeper = session.trace.hops[1].peer_id
        Fault(swarm, sleeper, "pause", "answering").arm()
        await story.decode()
        assert sleeper not in {hop.peer_id for hop in session.trace.hops}
        swarm.net.resume(sleeper)
        await story.decode(21)
        await story.reorder()
        await story.decode(31)
        await session.close()
        await access.close()


async def test_a_broken_stream_is_no_death(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        before = session.trace.hops
        for hop in before:
            swarm.net.transports[hop.peer_id].break_streams()
        await story.decode()
        await story.rollback()
        trace = session.trace
        assert [hop.peer_id for hop in trace.hops] == [hop.peer_id for hop in before]
        assert not trace.repairs
        await session.close()
        await access.close()


@pytest.mark.parametrize("kind", ["cut", "mute"])
async def test_rows_pass_through_the_client_where_servers_cannot_reach_each_other(
    folder: Path, kind: str
) -> None:
    """The spare cannot be reached from the server before it, in one way or both: only the rows of
    the failed span come to the client and go on from there.
    """
    async with real_swarm(folder, *SPANS, SPANS[1]) as swarm:
        access = swarm.access(**IMPATIENT, step_timeout=0.3, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=60)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        first, victim, last = (hop.peer_id for hop in session.trace.hops)
        (spare,) = set(swarm.peers) - {first, victim, last}
        swarm.net.cut(first, spare, one_way=kind == "mute")
        swarm.net.kill(victim)
        traffic, client = Traffic(swarm), swarm.client.peer_id
        await story.decode()
        assert [hop.peer_id for hop in session.trace.hops] == [first, spare, last]
        assert traffic.edges - {(first, spare)} == {(first, client), (client, spare)}
        assert {edge.way for edge in session.trace.edges} == {Way.VIA_CLIENT, Way.DIRECT}
        await story.reorder()
        await session.close()
        await access.close()


async def test_a_lone_server_that_comes_back_still_has_its_rows(folder: Path) -> None:
    async with real_swarm(folder, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        before = [hop.peer_id for hop in session.trace.hops]
        swarm.net.transports[before[1]].break_streams()
        swarm.net.pause(before[1])
        step = asyncio.create_task(story.reorder())
        await logged("waiting up to")
        swarm.net.resume(before[1])
        await step
        assert [hop.peer_id for hop in session.trace.hops] == before
        assert not session.trace.repairs
        await story.decode()
        await session.close()
        await access.close()


async def test_one_span_is_replaced_by_two_hops(folder: Path) -> None:
    async with real_swarm(folder, ALL, *SPANS) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0, allowed_servers=None)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        assert len(session.trace.hops) == 1
        strike(swarm, session.trace.hops[0].peer_id, "kill")
        await story.decode()
        assert len(session.trace.hops) == 3
        await story.reorder()
        await story.decode()
        await session.close()
        await access.close()


async def test_two_neighbours_are_replaced_together(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS[1:]) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        first, *others = (hop.peer_id for hop in session.trace.hops)
        for peer in others:
            swarm.net.kill(peer)
        await story.reorder()
        assert session.trace.hops[0].peer_id == first
        assert {repair.peer_id for repair in session.trace.repairs} == set(others)
        await story.decode()
        await session.close()
        await access.close()


async def test_who_should_refill_a_spare_and_is_silent_is_replaced_too(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS[1:]) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0, step_timeout=0.2)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        first, silent, dead = (hop.peer_id for hop in session.trace.hops)
        swarm.net.pause(silent)
        swarm.net.kill(dead)
        await story.decode()
        # Nobody called the silent one anew, and the first was not fed again.
        assert session.trace.hops[0].peer_id == first
        assert [repair.peer_id for repair in session.trace.repairs] == [dead, silent]
        await session.close()
        await access.close()


async def test_many_sessions_lose_the_same_server(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS, cache_tokens=2048) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        sessions = [SessionRows(access, ALL, max_length=40) for _ in range(4)]
        stories = [Story(swarm, one, [torch.empty(0, HIDDEN)] * 2) for one in sessions]
        await asyncio.gather(*(story.prefill() for story in stories))
        victim = sessions[0].trace.hops[1].peer_id
        swarm.net.kill(victim)
        await asyncio.gather(*(story.reorder() for story in stories))
        await asyncio.gather(*(story.decode() for story in stories))
        for session in sessions:
            assert victim not in {hop.peer_id for hop in session.trace.hops}
            await session.close()
        await access.close()


async def test_the_clients_own_network_was_away(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, SPANS[0]) as swarm:
        access = swarm.access(**IMPATIENT, repair_timeout=20.0)
        session = SessionRows(access, ALL, max_length=40)
        story = Story(swarm, session, [torch.empty(0, HIDDEN)] * 2)
        await story.prefill()
        before = [hop.peer_id for hop in session.trace.hops]
        for peer in swarm.peers:
            swarm.net.cut(swarm.client.peer_id, peer)
        step = asyncio.create_task(story.reorder())
        await logged("waiting up to")
        for peer in swarm.peers:
            swarm.net.heal(swarm.client.peer_id, peer)
        await step
        assert [hop.peer_id for hop in session.trace.hops] == before
        assert not session.trace.repairs
        await story.decode()
        await session.close()
        await access.close()
