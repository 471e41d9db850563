"""Where every sequence of a session stands.

A session takes one step at a time; a repeated step is answered from what was kept, an older frame
is dropped, a gap is refused. What it has put out it can put out again. Knows no streams, no other
hops and no blocks' insides.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import msgspec
import torch
from torch import Tensor

from petals.clock import Clock
from petals.errors import BadInput, PeerBusy, PetalsError, SessionClosed, SessionGap
from petals.logs import get_logger
from petals.models.adapters.low_rank import Adapter
from petals.server.compute.executor import Executor
from petals.server.compute.jobs import Work
from petals.server.compute.kv_pool import SessionKV
from petals.server.compute.step_plan import StepLimits, StepPlan, TokenRun, plan_step
from petals.server.session.client_channel import ClientChannel
from petals.server.session.kv_transfer import PageCopy, read_pages, write_pages
from petals.server.session.output_log import OutboxRows, OutputLog
from petals.types import BlockSpan, PeerId, SessionId
from petals.wire.fields import Message
from petals.wire.replies import StepResult
from petals.wire.requests import ReplayRequest, Step

logger = get_logger(__name__)
MAX_WAITING_STEPS = 16
"""Steps of one session that may wait for their turn (a client that sends ahead)."""

_KEPT_STEPS = 32
"""So many of the last steps are answered again, as long as their tokens stand."""

StepOutput = tuple[StepResult, Tensor]


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What a session is found by:

    one client may run one session through several parts of our span.
    """

    peer_id: PeerId
    session_id: SessionId
    blocks: BlockSpan

    def __str__(self) -> str:
        return f"{self.session_id.hex()[:8]} of …{self.peer_id[-6:]} in blocks {self.blocks}"


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that was run; its output is in the outbox."""

    plan: StepPlan
    result: StepResult

    def survives(self, starts: tuple[int, ...]) -> bool:
        """Do its tokens still stand when rows are cut to ``starts``?"""
        ends = zip(self.plan.counts, self.plan.lengths_after, starts)
        return all(not count or end <= start for count, end, start in ends)


class Session:
    """One client's sequences in ``key.blocks``.

    Steps run in the order they come. ``sink`` is where the client was heard last, ``tasks`` are the
    steps under way, ``sources`` the peers beside the client from whom steps are taken, ``prompts``
    [len(blocks), P, H] what is added on entering blocks, ``adapter`` what is added to their
    matrices, ``held`` what is given back once nothing runs in it any more.
    """

    def __init__(
        self,
        key: SessionKey,
        memory: tuple[SessionKV, OutputLog],
        limits: StepLimits,
        out_dtype: torch.dtype,
        clock: Clock,
    ) -> None:
        self.key = key
        self.kv, self.outbox = memory
        self.limits = limits
        self.out_dtype = out_dtype
        self.adapter: Adapter | None = None
        self.epoch = 0
        self.sources: frozenset[str] = frozenset()
        self.prompts: Tensor | None = None
        self.held = ExitStack()
        self.lengths: tuple[int, ...] = (0,) * len(self.kv.rows)
        self.closed = False
        self._clock = clock
        self._last_sign = clock.monotonic()
        self._last_step_id = -1
        self._last_answer: StepOutput | None = None
        self._done: deque[_Done] = deque(maxlen=_KEPT_STEPS)
        self._reordered_by: int | None = None
        self._copies: WeakSet[PageCopy] = WeakSet()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self.sink: ClientChannel | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def silent_seconds(self) -> float:
        """Time since the client's last sign of life; 0 while a step of its is under way."""
        return 0.0 if self._num_waiting else self._clock.monotonic() - self._last_sign

    @property
    def is_heard(self) -> bool:
        """True while the client's stream stands."""
        return self.sink is not None and self.sink.is_open

    def touch(self) -> None:
        """The client lives."""
        self._last_sign = self._clock.monotonic()

    def adopt(self, task: "asyncio.Task[None]") -> None:
        """A step of this session runs in ``task``:

        it ends when the session is closed, not when its stream breaks.
        """
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def tell(self, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Say something to the client, if it is there. Raises RequestTooLarge."""
        if self.sink is not None:
            await self.sink.answer(message, tensors)

    async def close(self) -> None:
        """No step runs or will run after this; the KV memory is then the caller's to free."""
        self.closed = True
        self._last_answer = None
        self.outbox.drop()
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def step(self, message: Step, hidden: Tensor, executor: Executor) -> StepOutput | None:
        """Run a step, or repeat the answer of an earlier one. None: a frame of an older epoch, to
        be dropped.

        hidden: [sum(counts), H], floating. Raises what ``plan_step`` and ``Executor.run`` raise,
        SessionGap for a step id that is already past, PeerBusy if too many steps wait,
        SessionClosed.
        """
        if self._num_waiting >= MAX_WAITING_STEPS:
            raise PeerBusy(
                f"{MAX_WAITING_STEPS} steps of this session wait already.",
                hint="Wait for answers before sending more.",
            )
        self._num_waiting += 1
        try:
            async with self._turn:
                return await self._step(message, hidden, executor)
        finally:
            self._num_waiting -= 1
            self.touch()

    async def outputs(self, message: ReplayRequest) -> tuple[OutboxRows, StepPlan, bool] | None:
        """What a replay is to push: the rows as they are between two steps, and which tokens.

        True: the rows stand as the reorder of the step to follow has left them. None: a frame of an
        older epoch. Raises OutboxLost, BadInput, SessionClosed, and SessionGap if a later step has
        reordered the rows.
        """
        async with self._turn:
            if self._is_old(message.epoch):
                return None
            plan, is_reordered = self._asked_for(message)
            return self.outbox.rows(), plan, is_reordered

    async def copy(self, message: ReplayRequest) -> tuple[PageCopy, OutboxRows | None] | None:
        """What a replay of pages is to read, and what was put out for it, if that is still kept.

        None: a frame of an older epoch. Raises what ``outputs`` raises, but for OutboxLost, and
        BadInput for blocks that keep more than pages.
        """
        if not self.kv.layout.kv_width(self.key.blocks):
            raise BadInput(
                "What these blocks keep cannot be handed over.",
                hint="Only servers that tell their kv_format can be asked for pages.",
            )
        async with self._turn:
            if self._is_old(message.epoch):
                return None
            copy = PageCopy(self._asked_for(message)[0])
            self._copies.add(copy)
            return copy, None if self.outbox.is_lost else self.outbox.rows()

    async def read(self, copy: PageCopy, pieces: Sequence[TokenRun], executor: Executor) -> Tensor:
        """Pages of a copy: [tokens, page width]. Raises SessionGap if it is spoilt."""
        pages = await executor.call(partial(read_pages, self.kv, pieces))
        copy.check()
        return pages

    async def put_pages(
        self, message: Step, pages: Tensor, outputs: Tensor | None, executor: Executor
    ) -> bool:
        """Let the rows go on with pages that were read elsewhere, and with what was put out for
        them. False: a frame of an older epoch, to be dropped.

        Raises what ``step`` raises.
        """
        async with self._turn:
            if self._is_old(message.epoch):
                return False
            self._begin_replay(message)
            plan = self._plan(message)
            write = partial(write_pages, kv=self.kv, plan=plan, pages=pages, outputs=outputs)
            await executor.at_place(write)
            self._cut(plan, message.step_id)
            self.lengths = plan.lengths_after
            if outputs is None:
                self.outbox.drop()
            else:
                self.outbox.append(plan.counts, outputs)
            self._done.clear()
            self._reordered_by = None
            return True

    def _asked_for(self, message: ReplayRequest) -> tuple[StepPlan, bool]:
        """See ``outputs``."""
        if self._reordered_by is not None and self._reordered_by > message.step_id:
            raise SessionGap(
                "The rows were reordered since the replay was asked for.", hint="Ask again."
            )
        lengths = message.lengths
        is_reordered = self._reordered_by == message.step_id and message.reorder is not None
        starts = (0,) * len(self.lengths) if message.onto is None else message.starts
        try:
            if is_reordered and message.reorder is not None:
                lengths = tuple(lengths[row] for row in message.reorder)
            # A step done already may have rolled rows back; it will do so again.
            standing = zip(lengths, self.lengths, starts, strict=True)
            counts = tuple(max(0, min(asked, have) - start) for asked, have, start in standing)
        except (IndexError, ValueError):
            raise BadInput(
                f"A replay of {len(lengths)} rows was asked for, {len(self.lengths)} are here.",
                hint="Give a length for every row the session had before the step.",
            ) from None
        return StepPlan(starts, counts, message.onto), is_reordered

    async def _step(self, message: Step, hidden: Tensor, executor: Executor) -> StepOutput | None:
        if self._is_old(message.epoch):
            return None
        if message.replay:
            self._begin_replay(message)
            answer = await self._run(message, hidden, executor)
            self._done.clear()
            self._reordered_by = message.step_id if message.reordered else None
            return answer
        if message.step_id > self._last_step_id:
            self._last_answer = await self._run(message, hidden, executor)
            self._last_step_id = message.step_id
        result, output = self._kept(message.step_id)
        result = msgspec.structs.replace(
            result, epoch=message.epoch, timings=message.timings, relayed=message.relayed
        )
        return result, output

    def _begin_replay(self, message: Step) -> None:
        """What the rows held is gone, and with it what was known of steps."""
        self._last_step_id, self._last_answer = message.step_id - 1, None
        self._reordered_by = None

    def _is_old(self, epoch: int) -> bool:
        if self.closed:
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        is_old = epoch < self.epoch
        self.epoch = max(epoch, self.epoch)
        return is_old

    def _kept(self, step_id: int) -> StepOutput:
        """The answer of a step that was done. Raises SessionGap if it is forgotten."""
        if step_id == self._last_step_id and self._last_answer is not None:
            return self._last_answer
        for done in self._done:
            stands = done.plan.num_tokens and not self.outbox.is_lost
            if stands and done.result.step_id == step_id:
                pieces = done.plan.pieces(0, done.plan.num_tokens)
                return done.result, torch.cat(list(self.outbox.rows().read(pieces)))
        raise SessionGap(
            f"Step {step_id} is past; the last one was {self._last_step_id}.",
            hint="Step ids only grow within a session.",
        )

    async def _run(self, message: Step, hidden: Tensor, executor: Executor) -> StepOutput:
        plan, key = self._plan(message), self.key
        work = Work(
            kv=self.kv,
            blocks=key.blocks,
            plan=plan,
            hidden=hidden,
            out_dtype=self.out_dtype,
            owner=key.peer_id,
            kind=plan.kind,
            prompts=self.prompts,
            adapter=self.adapter,
        )
        try:
            outcome = await executor.run(work)
        except PetalsError:
            if work.begun:
                self._cut(plan, message.step_id)
            raise
        self._cut(plan, message.step_id)
        self.lengths = plan.lengths_after
        self.outbox.append(plan.counts, outcome.hidden)
        result = StepResult(
            session_id=key.session_id,
            epoch=self.epoch,
            step_id=message.step_id,
            queue_seconds=outcome.queue_seconds,
            compute_seconds=outcome.compute_seconds,
            batch_tokens=outcome.batch_tokens,
        )
        self._done.append(_Done(plan, result))
        return result, outcome.hidden

    def _plan(self, message: Step) -> StepPlan:
        """A step begins. Raises what ``plan_step`` raises."""
        # A step that has reordered the rows before (it failed after that, or they were replayed so)
        # must not reorder the reordered.
        reorder = None if self._reordered_by == message.step_id else message.reorder
        plan = plan_step(message.starts, message.counts, reorder, self.lengths, self.limits)
        for copy in self._copies:
            copy.see(plan)
        return plan

    def _cut(self, plan: StepPlan, step_id: int) -> None:
        """The rows now end where the step begins."""
        if plan.reorder is not None:
            self._reordered_by = step_id
            self._done.clear()
        elif plan.starts != self.lengths:
            standing = [done for done in self._done if done.survives(plan.starts)]
            self._done = deque(standing, maxlen=_KEPT_STEPS)
        self.outbox.cut(plan.starts, plan.reorder)
        self.lengths = plan.starts
