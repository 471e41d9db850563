"""Plays a schedule of steps and faults in a simulated swarm, and checks what must hold.

- Outputs equal those of whole rows run without cache, bit by bit.
- A step ends, with outputs or with a typed error, within the virtual time that its faults explain;
  it fails only if a fault has struck, and then it has changed nothing.
- Both ends' ``check_integrity`` holds whenever they are idle.
- Once all servers and links work again, the next step succeeds, unless the session says that it is
  closed or that it was not kept.
- A session that is closed leaves no reservation at a server that lives, no stream and no task.
"""

import asyncio
import gc
import logging
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from petals.client.routing.bans import Cause
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.session.rows import SessionRows
from petals.client.session.state import SessionState
from petals.client.session.supervisor import SessionSupervisor
from petals.errors import PeerTimeout, PetalsError, RequestError, RouteError, SessionClosed
from petals.server.session.session import Session, SessionKey
from petals.types import BlockSpan, PeerId, SessionId
from petals.wire.fields import Message
from petals.wire.header import RequestHeader
from petals.wire.requests import Forwarded
from support.simulation.channels import SimNode
from support.simulation.faults import (
    KINDS_THAT_LOSE_NOTHING,
    Fault,
    FaultInjector,
    FaultKind,
    seeded_latencies,
)
from support.simulation.network import SimNetwork
from support.simulation.schedule import (
    FAILOVER,
    LAYOUTS,
    MAX_LENGTH,
    Fork,
    Rest,
    Schedule,
    Turn,
    client_config,
)
from support.simulation.servers import (
    LEASE_SECONDS,
    MODEL,
    SimDirectory,
    SimServer,
    SimServerOptions,
)
from support.simulation.story import Story
from support.simulation.toy_blocks import NOTHING, RunToken, token_states, whole_outputs
from support.simulation.virtual_time import run_virtually

T = TypeVar("T")

CLIENT = PeerId("client")
STEP_BOUND_SECONDS = 120.0
"""When a step counts as one that never ends."""

SECONDS_PER_FAULT = 5.0
"""Virtual time that a fault may cost beside the ``repair_timeout`` of the client: the silence, the
dials and the ban of a server follow each other. A slow server costs its time for every piece.
"""

CALM_SECONDS = 25.0
"""Longer than any ban and than the time for which a direct link is not used."""


@dataclass(slots=True)
class Copy:
    """A session and what the user knows of it. held_rows: the rows that servers hold: a step
    without tokens is sent together with the next one. is_lost: the client was allowed too little
    memory to feed the session again.
    """

    session: SessionRows
    rows: list[list[RunToken]]
    held_rows: list[list[RunToken]]
    is_lost: bool = False
    closing: asyncio.Task[None] | None = None

    @property
    def state(self) -> SessionState | None:
        """The state of the session, once it is open."""
        supervisor = self.session._supervisor
        return None if supervisor is None else supervisor.state


@dataclass(slots=True)
class Outcome:
    """What a play has seen. longest_seconds: of a step, in virtual time."""

    num_steps: int = 0
    num_messages: int = 0
    num_repairs: int = 0
    longest_seconds: float = 0.0
    faults: Counter[FaultKind] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def play(schedule: Schedule) -> Outcome:
    """Play a schedule. Raises AssertionError, with the story, if anything is wrong."""
    random.seed(0)
    story, outcome = Story(), Outcome()
    alarms = _Alarms()
    logger = logging.getLogger("petals")
    logger.addHandler(alarms)
    try:

        async def work() -> None:
            await _Play(schedule, story, outcome, alarms).run()

        run_virtually(work)
        assert not alarms.heard, "\n".join(alarms.heard)
    except Exception as error:
        told = f"{type(error).__name__}: {error}\n{schedule}\n{story.told()}"
        raise AssertionError(told) from error
    finally:
        logger.removeHandler(alarms)
    return outcome


class _Alarms(logging.Handler):
    """What the program reports as a defect of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        formatter = logging.Formatter()
        trace = formatter.formatException(record.exc_info) if record.exc_info else ""
        self.heard.append(f"{record.getMessage()} {trace}")

    def on_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        self.heard.append(f"{context.get('message')}: {error!r}")


class _Play:
    """One simulation."""

    def __init__(self, schedule: Schedule, story: Story, outcome: Outcome, alarms: _Alarms) -> None:
        asyncio.get_running_loop().set_exception_handler(alarms.on_loop)
        self._schedule = schedule
        self._setting = setting = schedule.setting
        self._story = story
        self._outcome = outcome
        self._net = SimNetwork(story)
        self._directory = SimDirectory()
        self._client = SimNode(self._net, CLIENT, self._directory)
        self._servers = [
            self._server(
                number,
                SimServerOptions(
                    blocks=BlockSpan(start, end),
                    rate=rate,
                    log_bytes=setting.log_bytes or 1 << 20,
                    kv_format="toy" if setting.has_kv_format else "",
                    replay_tokens=setting.chunk_tokens,
                ),
            )
            for number, (start, end, rate) in enumerate(LAYOUTS[setting.layout])
        ]
        self._directory.servers = self._servers
        self._blocks = BlockSpan(0, max(end for _, end, _ in LAYOUTS[setting.layout]))
        self._injector = FaultInjector(self._net, CLIENT, self._servers, self._on_user)
        self._access = SwarmConnection(
            client_config(setting), MODEL, self._blocks.end, self._client
        )
        session = SessionRows(
            self._access,
            self._blocks,
            max_length=MAX_LENGTH if setting.has_max_length else None,
            num_rows=setting.num_rows,
        )
        rows: list[list[RunToken]] = [[] for _ in range(setting.num_rows)]
        self._copies = [Copy(session, rows, rows)]
        """The one that the user works with comes first."""
        self._num_tokens = 0
        self._step: asyncio.Task[Any] | None = None
        self._is_calm = False

    async def run(self) -> None:
        peers = [CLIENT, *(server.peer_id for server in self._servers)]
        seeded_latencies(self._net, peers, self._setting.latencies)
        for server in self._servers:
            await server.start()
        self._swarm = await self._access.view()
        self._net.is_outdated = self._is_outdated
        self._watch_bans()
        for event in self._schedule.events:
            match event:
                case Turn():
                    await self._turn(event)
                case Rest(seconds):
                    self._note(f"rests for {seconds:g} s")
                    await self._net.clock.sleep(seconds)
                case Fork():
                    await self._fork()
                case Fault():
                    self._injector.arm(event)
            await self._check_idle()
        await self._end()

    # -- inside

    def _server(self, number: int, options: SimServerOptions) -> SimServer:
        peer = PeerId("ABCDEFGH"[number])
        return SimServer(self._net, self._directory, peer, options, FAILOVER)

    def _note(self, what: str) -> None:
        self._story.note(self._net.now(), "user", what)

    def _on_user(self, kind: FaultKind) -> None:
        if kind is FaultKind.CANCEL and self._step is not None:
            self._step.cancel()
        elif kind is FaultKind.CLOSE and self._copies[0].closing is None:
            copy = self._copies[0]
            copy.closing = asyncio.create_task(copy.session.close())

    async def _turn(self, turn: Turn) -> None:
        """One step, whatever comes of it."""
        order, copy = None, self._copies[0]
        if turn.order is not None:
            order = tuple(row % len(copy.rows) for row in turn.order)
        rows = copy.rows if order is None else [copy.rows[row] for row in order]
        starts, news = [], []
        for number, row in enumerate(rows):
            start = max(0, len(row) - turn.cuts[number % len(turn.cuts)])
            count = turn.counts[number % len(turn.counts)]
            starts.append(start if start + count <= MAX_LENGTH else 0)
            news.append([self._new_token() for _ in range(count)])
        after = [
            row[:start] + [(token, start + len(new)) for token in new]
            for row, start, new in zip(rows, starts, news)
        ]
        self._note(f"step: starts {starts} counts {[len(new) for new in news]} order {order}")
        if await self._run(starts, news, order, after):
            copy.rows = after
            if any(news):
                copy.held_rows = after

    async def _fork(self) -> None:
        """Go on with the other copy; there is a new one if there was none."""
        self._copies.reverse()
        if len(self._copies) > 1:
            return
        (copy,) = self._copies
        self._note("forks the session")
        num_tokens = sum(len(row) for row in copy.rows)
        fork = await self._result(copy.session.fork(), num_tokens)
        if fork is not None:
            self._copies.insert(0, Copy(fork, copy.rows, copy.held_rows))

    def _new_token(self) -> int:
        self._num_tokens += 1
        return self._num_tokens

    async def _run(
        self,
        starts: Sequence[int],
        news: Sequence[Sequence[int]],
        order: Sequence[int] | None,
        after: Sequence[Sequence[RunToken]],
    ) -> bool:
        """Whether the step has come to its end; its outputs are right then."""
        counts = [len(new) for new in news]
        hidden = token_states([token for new in news for token in new])
        was_closed = self._copies[0].closing is not None
        work = self._copies[0].session.step(hidden, starts, counts, order)
        output = await self._result(work, len(hidden))
        if output is None:
            return False
        assert not was_closed, "a step of a closed session has outputs"
        self._check_outputs(output, starts, counts, after)
        return True

    async def _result(self, work: Coroutine[Any, Any, T], num_tokens: int) -> T | None:
        """What a step or a fork of ``num_tokens`` brings; None if it may fail, or is given up."""
        began = self._net.now()
        self._step = step = asyncio.create_task(work)
        done, _ = await asyncio.wait({step}, timeout=STEP_BOUND_SECONDS)
        seconds = self._net.now() - began
        assert done, f"a step has not ended within {seconds:g} s"
        longest = self._explained_seconds(num_tokens)
        assert seconds <= longest, f"a step took {seconds:g} s, its faults explain {longest:g} s"
        self._outcome.num_steps += 1
        self._outcome.longest_seconds = max(self._outcome.longest_seconds, seconds)
        self._step = None
        if step.cancelled():
            self._note("has given the step up")
            return None
        error = step.exception()
        if error is not None:
            self._check_error(error)
            return None
        self._note(f"has its result after {seconds:.3f} s")
        return step.result()

    def _explained_seconds(self, num_tokens: int) -> float:
        """How long a step of ``num_tokens`` may take after the faults that have struck."""
        if self._injector.num_struck[FaultKind.LOSE]:
            # No real stream loses a message alone. Only the timeout of a step ends such a wait,
            # and that is a multiple of what one slow step took for each of its tokens.
            return STEP_BOUND_SECONDS
        setting, struck = self._schedule.setting, sum(self._injector.num_struck.values())
        faults = [event for event in self._schedule.events if isinstance(event, Fault)]
        slowest = max((f.seconds for f in faults if f.kind is FaultKind.SLOW), default=0.0)
        num_pieces = -(-num_tokens // (setting.chunk_tokens or MAX_LENGTH))
        # A piece may be repeated once, after the server's stream was opened anew.
        slow_seconds = 2 * num_pieces * slowest
        repair_seconds = client_config(setting).repair_timeout
        return repair_seconds + SECONDS_PER_FAULT * struck + slow_seconds

    def _check_outputs(
        self,
        output: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        after: Sequence[Sequence[RunToken]],
    ) -> None:
        assert len(output) == sum(counts)
        for number, (row, start, part) in enumerate(zip(after, starts, output.split(list(counts)))):
            expected = whole_outputs(tuple(row), self._blocks.end)[start:]
            assert torch.equal(part, expected), f"row {number} has wrong outputs from {start} on"

    def _check_error(self, error: BaseException) -> None:
        self._note(f"gets {type(error).__name__}: {error}")
        self._outcome.errors[type(error).__name__] += 1
        if not isinstance(error, PetalsError):
            raise error
        if isinstance(error, SessionClosed) and not error.reported:
            assert self._copies[0].closing is not None, "the session says that it is closed"
            return
        if type(error) is RouteError and not error.reported:
            assert self._setting.kept_bytes, "the inputs were not kept"
            self._copies[0].is_lost = True
            return
        may_fail = self._injector.num_struck and not self._is_calm
        assert may_fail, "a step failed although nothing has happened"
        assert error.reported or not isinstance(error, RequestError), "the user is blamed"

    async def _check_idle(self) -> None:
        for server in self._servers:
            await server.check_integrity()
        for copy in self._copies:
            self._check_rows(copy)

    def _watch_bans(self) -> None:
        """Only silence lets a server count as slow: a stream that has ended does not."""
        note = self._swarm.note_failure

        def note_failure(peer: PeerId, error: PetalsError, cause: Cause = Cause.FAILED) -> None:
            is_slow = cause is Cause.SLOW
            assert not is_slow or isinstance(error, PeerTimeout), f"{peer} counts as slow: {error}"
            note(peer, error, cause)

        self._swarm.note_failure = note_failure  # type: ignore[method-assign]

    def _is_outdated(self, target: PeerId, message: Message) -> bool:
        """Whether ``target`` knows a newer epoch than that of the message."""
        inner = message.message if isinstance(message, Forwarded) else message
        header = getattr(inner, "header", None)
        if not isinstance(header, RequestHeader):
            return False
        if target == CLIENT:
            states = [session.state for session in self._sessions()]
            hops = [hop for state in states for hop in (*state.legs, *state.joining)]
            epochs = [hop.epoch for hop in hops if hop.session_id == header.session_id]
        else:
            session = self._session_at(target, header.session_id)
            epochs = [] if session is None else [session.epoch]
        return any(epoch > header.epoch for epoch in epochs)

    def _sessions(self) -> list[SessionSupervisor]:
        """The sessions that are open, or being forked."""
        return [one for one in self._swarm.sessions if isinstance(one, SessionSupervisor)]

    def _check_rows(self, copy: Copy) -> None:
        """Every hop holds the session's rows, and their right outputs."""
        state = copy.state
        if state is None or state.is_closed or state.has_diverged or state.step is not None:
            return
        lengths = tuple(len(row) for row in copy.held_rows)
        assert state.confirmed.lengths == lengths, "the client counts other rows"
        for leg in state.legs:
            session = self._session_at(leg.peer_id, leg.session_id)
            if leg.state.is_lost or session is None:
                continue
            held = session.rows
            assert len(held.lengths) == len(lengths), f"{leg.peer_id} has another number of rows"
            pairs = zip(held.lengths, lengths)
            assert all(more >= length for more, length in pairs), f"{leg.peer_id} lacks rows"
            if not held.outputs.is_dropped:
                chunks = held.outputs.read((0,) * len(lengths), lengths)
                outputs = [chunk.hidden for chunk in chunks]
                expected = [whole_outputs(tuple(row), leg.blocks.end) for row in copy.held_rows]
                is_right = torch.equal(torch.cat([*outputs, NOTHING]), torch.cat(expected))
                assert is_right, f"{leg.peer_id} keeps wrong outputs"

    def _session_at(self, peer: PeerId, session_id: bytes) -> Session | None:
        """The session of that id at a server that lives."""
        server = next(server for server in self._servers if server.peer_id == peer)
        key = SessionKey(CLIENT, SessionId(session_id))
        return server.service.sessions.get(key) if server.is_alive else None

    async def _end(self) -> None:
        """Everything works again: the session does, too; then it leaves nothing behind."""
        await self._injector.calm()
        await self._net.clock.sleep(CALM_SECONDS)
        struck, self._is_calm = self._injector.num_struck, True
        for copy in list(self._copies):
            if copy.closing is None and not copy.is_lost:
                await self._turn(Turn((1,)))
            self._copies.reverse()
        self._outcome.faults = struck
        await self._check_idle()
        self._note("closes the session")
        for copy in self._copies:
            self._outcome.num_repairs += len(copy.session.trace.repairs)
            await copy.session.close()
        await self._access.close()
        await self._net.clock.sleep(1.0)
        if not set(struck) - set(KINDS_THAT_LOSE_NOTHING):
            self._check_nothing_held()
        await self._net.clock.sleep(2 * LEASE_SECONDS)
        self._check_nothing_held()
        await self._check_idle()
        await self._client.background.close()
        left = [channel for channel in self._net.channels if channel.outbound.source == CLIENT]
        assert not left, f"{len(left)} streams of the client are open"
        for server in self._servers:
            server.kill()
            await server.ended()
        await self._net.clock.sleep(1.0)
        assert not self._net.channels, "streams of servers are open"
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks are left: {others}"
        self._outcome.num_messages = self._net.num_sent
        del others, left
        gc.collect(0)

    def _check_nothing_held(self) -> None:
        for server in self._servers:
            server.check_nothing_held()
