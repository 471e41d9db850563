"""The model check can fail: it finds every rule of the session core that is broken here.

Each mutation breaks one rule of the real core. The check has to find a schedule that fails among
the first ``MAX_SCHEDULES``; nothing is shrunk. Work that does not end is a failure, too, by the
limits of ``support.simulation.virtual_time``.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
from torch import Tensor

from petals.client.session import fill, pipeline, replacement, supervisor
from petals.client.session.hop import HopReply, HopSession, LegStatus
from petals.client.session.state import PendingStep, SessionState
from petals.models.runtime.rope_lengths import whole_forward
from petals.models.runtime.token_log import TokenLog
from petals.server.session import rows
from petals.server.session.rows import CachedRows, InboundReplay, StepHistory
from petals.server.session.session import Session
from petals.wire.header import RequestHeader
from petals.wire.requests import ReplayPart
from support.simulation.faults import Fault
from support.simulation.faults import FaultKind as Kind
from support.simulation.play import play
from support.simulation.schedule import Schedule

from .schedules import at_every_message, draw

MAX_SCHEDULES = 400

Patch = pytest.MonkeyPatch


def replies_of_any_epoch(patch: Patch) -> None:
    def answer(self: Any, header: RequestHeader, message: Any, tensors: Any = ()) -> None:
        for waiting, take in list(self.waiting.items()):
            if waiting.request_id == header.request_id:
                take(HopReply(self, message, tensors))

    patch.setattr(HopSession, "_answer", answer)


def requests_of_any_epoch(patch: Patch) -> None:
    patch.setattr(Session, "is_outdated", lambda self, header: False)


def parts_of_any_replay(patch: Patch) -> None:
    patch.setattr(InboundReplay, "is_past", lambda self, part: False)
    patch.setattr(InboundReplay, "check", lambda self, part: None)


def replays_forget_rope_lengths(patch: Patch) -> None:
    for sender in (fill, rows):
        patch.setattr(sender, "to_runs", lambda starts, counts, lengths: ())


def logs_forget_rope_lengths(patch: Patch) -> None:
    append = TokenLog.append

    def forget(self: TokenLog, counts: Any, hidden: Tensor, rope_lengths: Any) -> None:
        append(self, counts, hidden, whole_forward(self.lengths, counts))

    patch.setattr(TokenLog, "append", forget)


def redialled_hop_dies_as_hung(patch: Patch) -> None:
    redial, book = HopSession.redial, replacement.book
    were_redialled: set[HopSession] = set()

    async def redial_and_remember(self: HopSession) -> None:
        await redial(self)
        were_redialled.add(self)

    def book_hung(context: Any, hops: Sequence[HopSession], excluded: Any) -> None:
        for hop in were_redialled.intersection(hops):
            hop.state = replace(hop.state, status=LegStatus.HUNG)
        book(context, hops, excluded)

    patch.setattr(HopSession, "redial", redial_and_remember)
    patch.setattr(replacement, "book", book_hung)


def unused_hops_are_kept(patch: Patch) -> None:
    def drop(context: Any, hops: Sequence[HopSession]) -> None:
        context.state.joining = [hop for hop in context.state.joining if hop not in hops]

    patch.setattr(replacement, "drop", drop)


def failed_reorder_is_forgotten(patch: Patch) -> None:
    begin = SessionState.begin

    def begin_harmless(self: SessionState, *args: Any) -> PendingStep:
        step = begin(self, *args)
        step.cuts_rows = False
        return step

    patch.setattr(SessionState, "begin", begin_harmless)


def reordered_is_dropped(patch: Patch) -> None:
    restart = StepHistory.restart

    def restart_plain(self: StepHistory, part: ReplayPart) -> None:
        restart(self, part)
        self.reordered_by = None

    patch.setattr(StepHistory, "restart", restart_plain)


def log_forgets_last_row(patch: Patch) -> None:
    append = TokenLog.append

    def append_less(self: Any, counts: Sequence[int], hidden: Tensor) -> None:
        append(self, counts, hidden)
        if len(counts) > 1 and not self.is_dropped:
            self._rows[-1] = []

    patch.setattr(TokenLog, "append", append_less)


def steps_run_twice(patch: Patch) -> None:
    step = CachedRows.step

    async def step_again(self: Any, message: Any, hidden: Tensor) -> Any:
        self.history.last_id = min(self.history.last_id, message.header.request_id - 1)
        return await step(self, message, hidden)

    patch.setattr(CachedRows, "step", step_again)


def switch_without_rows(patch: Patch) -> None:
    async def send(self: Any, *args: Any) -> bool:
        return True

    patch.setattr(replacement.MigrationLoop, "_send", send)


def draining_hop_misses_epoch(patch: Patch) -> None:
    async def announce_epoch(self: SessionState) -> None:
        for leg in self.legs:
            if leg.epoch != self.epoch and leg.state.status is LegStatus.CONNECTED:
                await self.announce_to(leg)

    patch.setattr(SessionState, "announce_epoch", announce_epoch)


def repaired_step_has_new_ids(patch: Patch) -> None:
    run_pieces = pipeline.run_pieces

    async def run_renamed(context: Any, pieces: Sequence[Any]) -> bool:
        for piece in pieces:
            piece.request_id = next(context.state.ids)
        return await run_pieces(context, pieces)

    patch.setattr(supervisor, "run_pieces", run_renamed)


def old_hops_are_not_freed(patch: Patch) -> None:
    async def switch(context: Any, old: Sequence[HopSession], hops: Sequence[HopSession]) -> None:
        context.state.switch(old, hops)
        await context.state.announce_epoch()

    patch.setattr(supervisor, "switch", switch)
    patch.setattr(replacement, "switch", switch)


def cut_steps_are_answered(patch: Patch) -> None:
    patch.setattr(StepHistory, "cut", lambda self, plan, step_id: None)


def interrupted_repair_keeps_hops(patch: Patch) -> None:
    patch.setattr(SessionState, "take_unused", lambda self: [])


def step_spins(patch: Patch) -> None:
    async def perform(self: Any, *args: Any) -> None:
        await asyncio.sleep(0)

    patch.setattr(supervisor.SessionSupervisor, "_perform", perform)


def step_waits_for_ever(patch: Patch) -> None:
    async def perform(self: Any, *args: Any) -> None:
        await asyncio.sleep(1.0)

    patch.setattr(supervisor.SessionSupervisor, "_perform", perform)


def close_waits_for_ever(patch: Patch) -> None:
    async def close(self: Any) -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)

    patch.setattr(HopSession, "close", close)


Schedules = Callable[[], Iterator[Schedule]]


def _drawn(first: int = 0, kinds: Collection[Kind] = (), **setting: Any) -> Schedules:
    numbers = range(first, first + MAX_SCHEDULES)
    return lambda: (draw(number, kinds, **setting) for number in numbers)


def _late(fault: Fault, kind: Kind, *seconds: float) -> Schedules:
    """A message is late, or comes once more late, when a fault strikes."""

    def faults(late: float, at: int) -> tuple[Fault, ...]:
        return fault if fault.at else replace(fault, at=at), Fault(kind, at, seconds=late)

    return lambda: chain.from_iterable(at_every_message(partial(faults, late)) for late in seconds)


MUTATIONS: dict[Callable[[Patch], None], Schedules] = {
    replies_of_any_epoch: _late(Fault(Kind.KILL, who=1), Kind.OVERTAKE, 0.1),
    requests_of_any_epoch: _late(
        Fault(Kind.FORGET, who=1), Kind.OVERTAKE, 0.08, 0.09, 0.1, 0.11, 0.12
    ),
    parts_of_any_replay: _late(
        Fault(Kind.DRAIN, at=1, who=2, seconds=8.0), Kind.REPEAT, 0.005, 0.01
    ),
    redialled_hop_dies_as_hung: _drawn(0, (Kind.BREAK, Kind.KILL)),
    replays_forget_rope_lengths: _drawn(),
    logs_forget_rope_lengths: _drawn(),
    unused_hops_are_kept: _drawn(),
    interrupted_repair_keeps_hops: _drawn(),
    failed_reorder_is_forgotten: _drawn(),
    reordered_is_dropped: _drawn(60, (Kind.KILL, Kind.KILL_SILENTLY, Kind.FAIL)),
    log_forgets_last_row: _drawn(),
    steps_run_twice: _drawn(),
    cut_steps_are_answered: _drawn(),
    switch_without_rows: _drawn(0, (Kind.DRAIN,)),
    draining_hop_misses_epoch: _drawn(0, (Kind.DRAIN, Kind.KILL, Kind.BREAK)),
    repaired_step_has_new_ids: _drawn(60, (Kind.KILL, Kind.KILL_SILENTLY, Kind.FAIL)),
    old_hops_are_not_freed: _drawn(),
    step_spins: _drawn(),
    step_waits_for_ever: _drawn(),
    close_waits_for_ever: _drawn(),
}
"""How a rule is broken -> the schedules of which one has to fail."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_is_found(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    for number, schedule in enumerate(MUTATIONS[mutation]()):
        try:
            play(schedule)
        except AssertionError as error:
            print(f"schedule {number}: {str(error).splitlines()[0]}")
            return
    pytest.fail(f"the check passes although {mutation.__name__}")
