"""The rows of one session on a server: their keys and values, their outputs, what was run in them.

Row = one sequence of the session's batch. ``CachedRows.check_integrity`` asserts these invariants
between two requests:

1. *One length.* A row has as many tokens in ``lengths`` as in the KV memory and in the output log,
   unless the log's content was dropped to stay within the budget.
2. *A step runs once.* Step ids only grow. An id that comes again is answered from the output log if
   all of its tokens still stand there, and is refused otherwise.
3. *A reorder is applied once.* ``reordered_by`` names the step whose reorder the rows show; that
   step does not reorder them again.
4. *A replay fills the rows from front to back.* Only the next part of the newest replay is taken; a
   step ends the replay. So a late part cannot overwrite what was filled or run after it.

``StepHistory`` and ``InboundReplay`` are plain values and arithmetic for 2 to 4. All methods of
``CachedRows`` but ``read`` need the session's turn. Knows no peers, no epochs, no blocks' insides.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import msgspec
import torch
from torch import Tensor

from petals.errors import BadInput, PeerFailed, PetalsError, SessionGap
from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.rope_lengths import to_runs
from petals.models.runtime.token_log import LoggedTokens, TokenLog
from petals.server.admission import validation
from petals.server.admission.offer import ServedModel
from petals.server.compute.executor import Executor
from petals.server.compute.jobs import Outcome
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_job import StepJob, StepLimits, StepPlan, plan_step
from petals.server.session.kv_transfer import KVCopy, read_kv, write_kv
from petals.server.session.replay import ReplaySource, plan_replay
from petals.types import PeerId
from petals.wire.header import Timing
from petals.wire.requests import OpenSession, ReplayPart, ReplayRequest, Step

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


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """What a session has of the server. ``release`` gives all of it back but the log.

    prompts: ``[blocks, P, H]`` on the device, added on entering blocks.
    """

    kv: SessionKV
    outputs: TokenLog
    prompts: Tensor | None
    adapter: Adapter | None
    release: ExitStack


@dataclass(frozen=True, slots=True)
class StepOutput:
    """hidden: [sum(counts), H] on the CPU, in the dtype of the session."""

    hidden: Tensor
    timing: Timing


class CachedRows:
    """See the module. ``owner``: the client. ``request``: what was granted to it."""

    def __init__(
        self,
        owner: PeerId,
        request: OpenSession,
        offer: ServedModel,
        reservation: Reservation,
        executor: Executor,
    ) -> None:
        max_length = request.max_length or offer.max_length
        self.limits = StepLimits(offer.max_rows, max_length, offer.max_step_tokens)
        self.kv = reservation.kv
        self.outputs = reservation.outputs
        self.history = StepHistory()
        self.lengths: tuple[int, ...] = self.outputs.lengths
        self._owner = owner
        self._offer = offer
        self._dtype = validation.state_dtype(request.dtype)
        self._prompts = reservation.prompts
        self._adapter = reservation.adapter
        self._executor = executor
        self._inbound = InboundReplay()
        self._copies: WeakSet[KVCopy] = WeakSet()

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that the blocks keep of one token of one row."""
        return self.kv.layout.token_bytes(self.kv.blocks)

    async def step(self, message: Step, hidden: Tensor) -> StepOutput:
        """Run a step, or repeat the answer of one that was run.

        Raises what ``plan_step`` and ``Executor.run`` raise, SessionGap for a step id that is past.
        """
        step_id = message.header.request_id
        if step_id <= self.history.last_id:
            return self._repeat(message)
        reorder = self.history.pending_reorder(message)
        plan = self._plan(message, reorder)
        outcome = await self._run(plan, hidden, partial(self._begin_step, step_id, plan))
        timing = (outcome.queue_seconds, outcome.compute_seconds, outcome.batch_tokens)
        self.history.add(DoneStep(step_id, plan, timing))
        return StepOutput(outcome.value, timing)

    async def fill(self, part: ReplayPart, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Run the next part of a replay. Returns the outputs to forward: none if keys and values
        came. None: a part of an older replay, or one that came before.

        Raises what ``step`` raises, SessionGap for a part that does not follow the last one.
        """
        if self._inbound.is_past(part):
            return None
        self._inbound.check(part)
        if part.index and (part.reorder is not None or part.starts != self.lengths):
            raise SessionGap(
                "The part does not begin where the rows end.", hint="Ask for a new replay."
            )
        plan = self._plan(part, part.reorder)
        begin = partial(self._begin_part, part)
        if part.kv:
            await self._take_kv(plan, part, tensors, begin)
            forwarded: tuple[Tensor, ...] = ()
        else:
            hidden = validation.only_states(self._offer, tensors, plan.num_tokens)
            forwarded = ((await self._run(plan, hidden, begin)).value,)
        self._inbound.finish(part)
        return forwarded

    def source(self, request: ReplayRequest) -> ReplaySource:
        """What a replay sends: the rows as they are now. Raises BadInput, and SessionGap if a later
        step has reordered the rows.
        """
        if request.kv and not self.kv.layout.kv_width(self.kv.blocks):
            raise BadInput(
                "These blocks keep more than keys and values.",
                hint="Only servers that name a kv_format can be asked for keys and values.",
            )
        plan, is_reordered = plan_replay(request, self.lengths, self.history.reordered_by)
        copy = KVCopy(plan) if request.kv else None
        if copy is not None:
            self._copies.add(copy)
        return ReplaySource(request, plan, is_reordered, self.outputs.branch(), copy)

    async def read(
        self, part: ReplayPart, source: ReplaySource
    ) -> tuple[ReplayPart, tuple[Tensor, ...]]:
        """A part with its rope lengths, and its tensors. Needs no turn: steps may run in between.

        Raises OutboxLost, and SessionGap if a step has cut or reordered the keys and values.
        """
        if source.kv_copy is None:
            part, outputs = self._logged(part, source.outputs)
            return part, (outputs,)
        values = await self._executor.call(partial(read_kv, self.kv, part.starts, part.counts))
        source.kv_copy.check()
        if source.outputs.is_dropped:
            return part, (values,)
        part, outputs = self._logged(part, source.outputs)
        return part, (values, outputs)

    async def copy_to(self, kv: SessionKV, outputs: TokenLog, lengths: tuple[int, ...]) -> None:
        """Let a new session begin with the first ``lengths[r]`` tokens of each row: ``kv`` is its
        memory, ``outputs`` its log. Steps are not copied: ids begin anew in another session.

        Raises SessionGap if the rows are others or shorter, SessionClosed, PeerFailed.
        """
        have = self.lengths
        if len(lengths) != len(have) or any(length > has for length, has in zip(lengths, have)):
            raise SessionGap(
                f"The rows to be forked have {list(have)[:8]} tokens, not {list(lengths)[:8]}.",
                hint="Fill a new session.",
            )
        try:
            await self._executor.call(partial(kv.fork, self.kv, lengths))
        except RuntimeError as error:  # for example, the device is out of memory
            raise PeerFailed("The server could not copy the keys and values.") from error
        outputs.take(self.outputs.branch(lengths))

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        log = self.outputs
        _claim(tuple(row.length for row in self.kv.rows) == self.lengths, "KV rows differ")
        _claim(log.is_dropped or log.lengths == self.lengths, "the output log differs")
        for done in self.history.done:
            _claim(done.step_id <= self.history.last_id, "a step is newer than the last one")
            _claim(done.survives(self.lengths), "a step is remembered whose tokens are cut")

    # -- inside

    def _plan(self, message: Step | ReplayPart, reorder: tuple[int, ...] | None) -> StepPlan:
        """What is about to be run. Raises what ``plan_step`` raises."""
        starts, counts, runs = message.starts, message.counts, message.rope_runs
        plan = plan_step(starts, counts, reorder, self.lengths, self.limits, runs)
        for copy in self._copies:
            copy.see(plan)
        return plan

    def _repeat(self, message: Step) -> StepOutput:
        """The answer of a step that was run. Raises SessionGap if it is kept no more."""
        done = self.history.find(message)
        plan = done.plan
        if self.outputs.is_dropped and plan.num_tokens:
            raise SessionGap(
                "The output of the step was dropped to make room for other sessions.",
                hint="Go on behind the step, or fill a new session.",
            )
        return StepOutput(self._joined(self.outputs.read(plan.starts, plan.counts)), done.timing)

    async def _run(
        self, plan: StepPlan, hidden: Tensor, begin: Callable[[], None]
    ) -> Outcome[Tensor]:
        """Run tokens and append them to the rows. The only place that gives work to the executor.

        ``begin`` is called if the rows were touched; after an error they end where ``plan`` begins.
        """
        job = StepJob(
            kv=self.kv,
            blocks=self.kv.blocks,
            plan=plan,
            hidden=hidden,
            out_dtype=self._dtype,
            owner=self._owner,
            prompts=self._prompts,
            adapter=self._adapter,
        )
        try:
            outcome = await self._executor.run(job)
        except PetalsError:
            if job.has_begun:
                self._cut(plan, begin)
            raise
        self._cut(plan, begin)
        self.outputs.append(plan.counts, outcome.value, plan.rope_lengths)
        self.lengths = plan.lengths_after
        return outcome

    async def _take_kv(
        self, plan: StepPlan, part: ReplayPart, tensors: Sequence[Tensor], begin: Callable[[], None]
    ) -> None:
        """Append keys and values that were computed elsewhere, and outputs, if they came, too."""
        values, outputs = validation.kv_and_outputs(
            self._offer, self.kv, self._dtype, part, tensors
        )
        write = partial(write_kv, kv=self.kv, plan=plan, values=values, outputs=outputs)
        try:
            await self._executor.call_on_device(write)
        except RuntimeError as error:  # for example, the device is out of memory
            self._cut(plan, begin)
            raise PeerFailed("The server could not keep the keys and values.") from error
        self._cut(plan, begin)
        if outputs is None:
            self.outputs.drop()
        else:
            self.outputs.append(plan.counts, outputs, plan.rope_lengths)
        self.lengths = plan.lengths_after

    def _begin_step(self, step_id: int, plan: StepPlan) -> None:
        self._inbound.end(step_id)
        if plan.reorder is not None or plan.starts != self.lengths:
            self.history.cut(plan, step_id)

    def _begin_part(self, part: ReplayPart) -> None:
        self._inbound.begin(part)
        if part.index == 0:
            self.history.restart(part)

    def _cut(self, plan: StepPlan, begin: Callable[[], None]) -> None:
        """Let the rows end where ``plan`` begins, as the KV rows do already."""
        begin()
        if plan.reorder is not None or plan.starts != self.lengths or self.outputs.is_dropped:
            self.outputs.cut(plan.starts, plan.reorder)
        self.lengths = plan.starts

    def _logged(self, part: ReplayPart, log: TokenLog) -> tuple[ReplayPart, Tensor]:
        """A part with the rope lengths of its tokens, and their outputs. Raises OutboxLost."""
        chunks = list(log.read(part.starts, part.counts))
        lengths = tuple(length for chunk in chunks for length in chunk.rope_lengths.tolist())
        runs = to_runs(part.starts, part.counts, lengths)
        return msgspec.structs.replace(part, rope_runs=runs), self._joined(chunks)

    def _joined(self, chunks: Iterable[LoggedTokens]) -> Tensor:
        """The hidden states of chunks as one: [tokens, H]."""
        empty = torch.empty(0, self._offer.hidden_size, dtype=self._dtype)
        return torch.cat([empty, *(chunk.hidden for chunk in chunks)])


def _claim(holds: bool, complaint: str) -> None:
    if not holds:
        raise AssertionError(complaint)
