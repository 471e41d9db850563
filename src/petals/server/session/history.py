"""What a session has run: its steps, the reorder its rows show, and how far a replay has come.

Plain values and arithmetic: no tensors, no waiting. Knows no peers.
"""

from collections import deque
from dataclasses import dataclass

from petals.errors import SessionGap
from petals.server.compute.step_job import StepPlan
from petals.wire.header import Timing
from petals.wire.requests import ReplayPart, Step

KEPT_STEPS = 32
"""Most steps that can be answered again; as many pieces of a prompt may be under way at once."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step that was run; its output is in the session's output log."""

    step_id: int
    plan: StepPlan
    timing: Timing

    def survives(self, starts: tuple[int, ...]) -> bool:
        """Whether all of its tokens still stand once the rows are cut to ``starts``."""
        ends = zip(self.plan.counts, self.plan.lengths_after, starts)
        return all(not count or end <= start for count, end, start in ends)


class StepHistory:
    """The steps of one session. Their ids only grow."""

    def __init__(self) -> None:
        self.last_id = -1
        """Id of the newest step that was run, or that the rows were replayed for (minus 1)."""
        self.reordered_by: int | None = None
        """Id of the step whose reorder the rows show. That step must not reorder them again."""
        self._done: deque[DoneStep] = deque(maxlen=KEPT_STEPS)

    @property
    def done(self) -> tuple[DoneStep, ...]:
        """The steps that can be answered again, oldest first."""
        return tuple(self._done)

    def pending_reorder(self, step: Step) -> tuple[int, ...] | None:
        """The reorder that the rows still need for ``step``.

        A step may come a second time after it has reordered the rows: it failed after that, or the
        rows were replayed as it had left them at another hop.
        """
        return None if self.reordered_by == step.header.request_id else step.reorder

    def find(self, step: Step) -> DoneStep:
        """The run of a step that comes again. Raises SessionGap if it cannot be answered."""
        step_id = step.header.request_id
        for done in self._done:
            if done.step_id == step_id:
                if (done.plan.starts, done.plan.counts) != (step.starts, step.counts):
                    raise SessionGap(
                        f"Step {step_id} was run with other tokens before.",
                        hint="A repeated step keeps its tokens; give a new step a new id.",
                    )
                return done
        raise SessionGap(
            f"Step {step_id} is past; the last one was {self.last_id}.",
            hint="Step ids only grow within a session.",
        )

    def cut(self, plan: StepPlan, step_id: int) -> None:
        """The rows now end where step ``step_id`` begins."""
        if plan.reorder is not None:
            self.reordered_by = step_id
            self._done.clear()
        else:
            kept = [done for done in self._done if done.survives(plan.starts)]
            self._done = deque(kept, maxlen=KEPT_STEPS)

    def add(self, done: DoneStep) -> None:
        """A step was run."""
        self.last_id = done.step_id
        self._done.append(done)

    def restart(self, part: ReplayPart) -> None:
        """A replay begins: the rows are gone, and with them what was known of steps."""
        self.last_id = part.before_step - 1
        self.reordered_by = part.before_step if part.reordered else None
        self._done.clear()


class InboundReplay:
    """Which part of which replay a session takes next.

    Requests of a session have ids that grow. A replay is older than every request that has touched
    the rows since, so a late part of it must not touch them again: it would overwrite rows that are
    right by rows that were right once, and the lengths would not show it.
    """

    def __init__(self) -> None:
        self.newest_id = -1
        """Id of the newest replay or step that has touched the rows."""
        self._num_seen = 0
        self._is_open = False

    def is_past(self, part: ReplayPart) -> bool:
        """Whether the part belongs to an older replay, or came before: it is dropped."""
        replay_id = part.header.request_id
        is_repeated = replay_id == self.newest_id and part.index < self._num_seen
        return replay_id < self.newest_id or is_repeated

    def check(self, part: ReplayPart) -> None:
        """Raises SessionGap unless the part begins a replay, or goes on where it ended."""
        is_next = part.index == 0
        if part.header.request_id == self.newest_id:
            is_next = self._is_open and part.index == self._num_seen
        if not is_next:
            raise SessionGap(
                f"Part {part.index} of replay {part.header.request_id} does not follow the parts "
                "before it.",
                hint="Ask for a new replay, under a new id.",
            )

    def begin(self, part: ReplayPart) -> None:
        """A part is about to touch the rows. If it fails, no part can follow it."""
        self.newest_id = part.header.request_id
        self._num_seen = part.index + 1
        self._is_open = False

    def finish(self, part: ReplayPart) -> None:
        """The rows are filled with a part."""
        self._is_open = not part.ends

    def end(self, step_id: int) -> None:
        """A step touches the rows: no part of an earlier replay may touch them any more."""
        self.newest_id = max(self.newest_id, step_id)
        self._is_open = False
