"""The model check can fail: it finds every rule of the session core that is broken here.

Each mutation breaks one rule of the real core. The check has to find a schedule that fails among
the first ``MAX_SCHEDULES``; nothing is shrunk. Work that does not end is a failure, too, by the
limits of ``support.simulation.virtual_time``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from petals.client.session import pipeline, replacement, supervisor
from petals.client.session.hop import HopReply, HopSession, LegState, LegStatus
from petals.client.session.state import PendingStep, SessionState
from petals.errors import PetalsError
from petals.models.runtime.token_log import TokenLog
from petals.server.session.kv_transfer import KVCopy
from petals.server.session.rows import CachedRows, InboundReplay, StepHistory
from petals.server.session.session import ClientChannel, Session
from petals.wire.header import RequestHeader
from petals.wire.requests import ReplayPart

MAX_SCHEDULES = 400

Patch = pytest.MonkeyPatch


def replies_of_any_epoch(patch: Patch) -> None:
    def answer(
        self: Any, header: RequestHeader, message: Any, tensors: Sequence[Tensor] = ()
    ) -> None:
        for waiting, take in list(self.waiting.items()):
            if replace_epoch(waiting, header.epoch) == header:
                take(HopReply(self, message, tensors))

    patch.setattr(HopSession, "_answer", answer)


def replace_epoch(header: RequestHeader, epoch: int) -> RequestHeader:
    return RequestHeader(header.session_id, epoch, header.request_id)


def requests_of_any_epoch(patch: Patch) -> None:
    patch.setattr(Session, "is_outdated", lambda self, header: False)


def epoch_goes_back(patch: Patch) -> None:
    def begin_epoch(self: Any, epoch: int, sources: Sequence[str]) -> None:
        self._epoch, self._sources = epoch, frozenset(sources)

    patch.setattr(Session, "begin_epoch", begin_epoch)


def parts_of_older_replays(patch: Patch) -> None:
    patch.setattr(InboundReplay, "is_past", lambda self, part: False)


def redialled_hop_is_slow(patch: Patch) -> None:
    redial, lost = HopSession.redial, LegState.lost

    async def redial_slow(self: Any, *args: Any) -> None:
        was_slow = self.state.status is LegStatus.SLOW
        await redial(self, *args)
        self.was_slow = was_slow

    def lose(self: Any, error: PetalsError) -> None:
        error.peer_id = error.peer_id or self.peer_id
        state = lost(self.state, error)
        if getattr(self, "was_slow", False) and state.is_lost:
            state = replace(state, status=LegStatus.SLOW)
        self._change(state)

    patch.setattr(HopSession, "redial", redial_slow)
    patch.setattr(HopSession, "lose", lose)


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


def spoilt_copy_is_used(patch: Patch) -> None:
    patch.setattr(KVCopy, "check", lambda self: None)


def pieces_overtake(patch: Patch) -> None:
    async def turn(self: Any, number: int, hop: int) -> None:
        return None

    patch.setattr(pipeline._PiecesRun, "_turn", turn)


def old_hops_are_not_freed(patch: Patch) -> None:
    async def switch(context: Any, old: Sequence[HopSession], hops: Sequence[HopSession]) -> None:
        context.state.switch(old, hops)
        await context.state.announce_epoch()

    patch.setattr(supervisor, "switch", switch)
    patch.setattr(replacement, "switch", switch)


def older_channel_takes_over(patch: Patch) -> None:
    patch.setattr(ClientChannel, "is_newer_than", lambda self, other: False)


def replies_to_any_row(patch: Patch) -> None:
    patch.setattr(StepHistory, "cut", lambda self, plan, step_id: None)


MUTATIONS: tuple[Callable[[Patch], None], ...] = (
    replies_of_any_epoch,
    requests_of_any_epoch,
    epoch_goes_back,
    parts_of_older_replays,
    redialled_hop_is_slow,
    unused_hops_are_kept,
    failed_reorder_is_forgotten,
    reordered_is_dropped,
    log_forgets_last_row,
    steps_run_twice,
    switch_without_rows,
    draining_hop_misses_epoch,
    repaired_step_has_new_ids,
    spoilt_copy_is_used,
    pieces_overtake,
    old_hops_are_not_freed,
    older_channel_takes_over,
    replies_to_any_row,
)

K = __import__("support.simulation.faults").simulation.faults.FaultKind
replies_of_any_epoch.kinds = (K.KILL, K.BREAK, K.STALL, K.REPEAT, K.OVERTAKE, K.PAUSE)
requests_of_any_epoch.kinds = (K.KILL, K.BREAK, K.STALL, K.REPEAT, K.OVERTAKE, K.PAUSE)
parts_of_older_replays.kinds = (K.KILL, K.REPEAT, K.OVERTAKE, K.STALL)
redialled_hop_is_slow.kinds = (K.SLOW, K.DEAF, K.KILL, K.BREAK, K.FORGET)
spoilt_copy_is_used.kinds = (K.DRAIN,)
draining_hop_misses_epoch.kinds = (K.DRAIN,K.KILL, K.BREAK)
reordered_is_dropped.kinds = (K.KILL,K.KILL_SILENTLY,K.FAIL)
