"""States go from server to server; what cannot pass goes through the client; nothing is lost."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from petals.client.session.rows import SessionRows
from petals.client.trace import Way
from petals.swarm.rpc.channel import Channel
from petals.testing.tiny_models import write_tiny_model
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.replies import StepResult
from petals.wire.requests import Forwarded, Step
from support.reference import assert_close, states
from support.session_script import IMPATIENT, SPANS, Story, logged, story_in
from support.swarm import RealSwarm, real_swarm

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


def ring_of(session: SessionRows, client: PeerId) -> set[tuple[PeerId, PeerId]]:
    stops = [client, *(hop.peer_id for hop in session.trace.hops), client]
    return set(zip(stops, stops[1:]))


async def long_steps(story: Story) -> None:
    """A prefill in pieces, a long rollback and a reorder."""
    session, swarm = story.session, story.swarm
    text, other = states(40, 1), states(16, 2)
    rows = [text[:32], text[:16]]
    output = await session.step(torch.cat(rows), (0, 0), (32, 16))
    torch.testing.assert_close(output[:32], swarm.expected(rows[0]), rtol=1e-4, atol=1e-5)
    output = await session.step(other, (16, 16), (8, 8), reorder=(1, 0))
    again = torch.cat([text[:16], other[8:]])
    torch.testing.assert_close(output[8:], swarm.expected(again)[16:], rtol=1e-4, atol=1e-5)


async def test_no_state_in_between_crosses_the_client(folder: Path) -> None:
    async with story_in(folder, *SPANS) as story:
        traffic = Traffic(story.swarm)
        await long_steps(story)
        assert traffic.edges == ring_of(story.session, story.swarm.node.peer_id)
        trace = story.session.trace
        assert {edge.way for edge in trace.edges} == {Way.DIRECT}
        assert all(len(hop.steps) == 4 for hop in trace.hops)


async def test_a_span_is_refilled_by_the_server_before_it(folder: Path) -> None:
    async with story_in(folder, *SPANS, SPANS[1]) as story:
        await long_steps(story)
        old, victim, last = story.peers
        story.swarm.net.kill(victim)
        traffic = Traffic(story.swarm)
        await story.session.step(states(2, 9), (24, 24), (1, 1))
        spare = story.peers[1]
        assert story.peers == [old, spare, last]
        assert spare != victim
        assert traffic.edges == {(old, spare)}


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode", "rollback", "reorder"])
async def test_an_edge_that_is_cut_goes_through_the_client(
    folder: Path, phase: str, one_way: bool
) -> None:
    async with story_in(folder, *SPANS, step_timeout=0.2) as story:
        await story.open()
        before = story.peers
        _, two, three = before
        await story.tell(phase, lambda: story.swarm.net.cut(two, three, one_way=one_way))
        assert story.peers == before
        assert not story.repaired
        assert Way.VIA_CLIENT in {edge.way for edge in story.session.trace.edges}


NEVER = 1e9
"""Factor of a timeout that nobody waits for."""


async def prompt_through_the_client(story: Story) -> None:
    """A prompt in pieces comes out right although two hops cannot reach each other any more."""
    prompt, expected = states(96, 3), story.swarm.expected
    output = await story.session.step(prompt, (0, 0), (48, 48))
    assert_close(output, torch.cat([expected(row) for row in prompt.split(48)]))
    assert Way.VIA_CLIENT in {edge.way for edge in story.session.trace.edges}
    assert not story.repaired


async def test_a_first_prompt_does_not_wait_for_a_pace_that_nobody_has_measured(
    folder: Path,
) -> None:
    servers = {"silence_seconds": 0.5}
    async with story_in(folder, *SPANS, servers=servers, unmeasured_factor=NEVER) as story:
        net, client = story.swarm.net, story.swarm.node.peer_id

        def cut(source: PeerId, target: PeerId, num_bytes: int) -> None:
            if num_bytes > LARGE and source != client:
                net.cut(source, target)
                net.on_write = lambda *write: None

        net.on_write = cut
        await prompt_through_the_client(story)


@pytest.mark.parametrize("is_liar", [False, True], ids=["broken link", "liar"])
async def test_states_that_the_next_hop_refuses_are_looked_at_by_the_client(
    folder: Path, is_liar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of two hops is banned for what one says of the other: their link goes through the
    client, which sees whose states are wrong.
    """
    async with story_in(folder, *SPANS, SPANS[0]) as story:
        await story.prefill()
        first, second, last = story.peers
        send, liars = Channel.send, set()

        async def spoil(channel: Channel, message: Message, tensors: Sequence[Tensor] = ()) -> None:
            if isinstance(message, Step) and channel.peer_id == first:
                liars.add(message.header.session_id)
            is_forwarded = isinstance(message, Forwarded) and channel.peer_id == second
            is_result = isinstance(message, StepResult) and message.header.session_id in liars
            if liars and (is_forwarded or (is_liar and is_result)):
                tensors = [tensor * torch.nan for tensor in tensors]
            await send(channel, message, tensors)

        monkeypatch.setattr(Channel, "send", spoil)
        await story.decode()
        swarm = await story.access.view()
        banned = swarm.bans.at(story.swarm.node.clock.monotonic())
        if is_liar:
            assert story.repaired == [first] and banned == {first}
        else:
            assert story.peers == [first, second, last] and not banned
            assert story.session.trace.edges[0].way is Way.VIA_CLIENT


async def test_a_broken_stream_is_no_death(folder: Path) -> None:
    async with story_in(folder, *SPANS, *SPANS) as story:
        await story.prefill()
        before = story.peers
        for peer in before:
            story.swarm.net.transports[peer].break_streams()
        await story.decode()
        await story.rollback()
        assert story.peers == before
        assert not story.repaired


@pytest.mark.parametrize("kind", ["cut", "mute"])
async def test_rows_pass_through_the_client_where_servers_cannot_reach_each_other(
    folder: Path, kind: str
) -> None:
    """The spare cannot be reached from the server before it, in one way or both: only the rows of
    the failed span come to the client and go on from there.
    """
    async with story_in(folder, *SPANS, SPANS[1], step_timeout=0.3) as story:
        swarm = story.swarm
        await story.prefill()
        first, victim, last = story.peers
        (spare,) = set(swarm.peers) - {first, victim, last}
        swarm.net.cut(first, spare, one_way=kind == "mute")
        swarm.net.kill(victim)
        traffic, client = Traffic(swarm), swarm.node.peer_id
        await story.decode()
        assert story.peers == [first, spare, last]
        assert traffic.edges - {(first, spare)} == {(first, client), (client, spare)}
        ways = {edge.way for edge in story.session.trace.edges}
        assert ways == {Way.VIA_CLIENT, Way.DIRECT}
        await story.reorder()


async def test_a_lone_server_that_comes_back_still_has_its_rows(folder: Path) -> None:
    async with story_in(folder, *SPANS) as story:
        await story.prefill()
        before, net = story.peers, story.swarm.net
        net.transports[before[1]].break_streams()
        net.pause(before[1])
        async with logged("waiting up to", "petals.client.session.supervisor"):
            step = asyncio.create_task(story.reorder())
        net.resume(before[1])
        await step
        assert story.peers == before
        assert not story.repaired
        await story.decode()


async def test_many_sessions_lose_the_same_server(folder: Path) -> None:
    async with real_swarm(folder, *SPANS, *SPANS, cache_tokens=2048) as swarm:
        access = swarm.connection(**IMPATIENT, repair_timeout=20.0)
        stories = [Story.begin(swarm, access, 40) for _ in range(4)]
        await asyncio.gather(*(story.prefill() for story in stories))
        victim = stories[0].peers[1]
        swarm.net.kill(victim)
        await asyncio.gather(*(story.reorder() for story in stories))
        await asyncio.gather(*(story.decode() for story in stories))
        for story in stories:
            assert victim not in story.peers
            await story.session.close()
        await access.close()
