"""Where every sequence of a session stands, and the table of all sessions of a server.

A session takes one step at a time; a repeated step is answered from what was kept, an older frame
is dropped, a gap is refused. The table frees what nobody speaks for any more. Knows no streams and
no blocks' insides.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import torch

from petals.clock import Clock
from petals.errors import PeerBusy, PetalsError, SessionClosed, SessionGap
from petals.logs import get_logger
from petals.server.executor import Executor, Work
from petals.server.kv_pages import SessionKV
from petals.server.sinks import Sink
from petals.server.steps import StepLimits, plan_step
from petals.types import BlockSpan, PeerId, SessionId
from petals.wire.messages import Step, StepResult

logger = get_logger(__name__)
MAX_WAITING_STEPS = 16
"""Steps of one session that may wait for their turn (a client that sends ahead)."""

Answer = tuple[StepResult, torch.Tensor]


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


class Session:
    """One client's sequences in ``key.blocks``.

    Steps run in the order they come; the result of the last one is kept until the next. ``sink`` is
    where the client was heard last, ``tasks`` are the steps under way.
    """

    def __init__(
        self,
        key: SessionKey,
        kv: SessionKV,
        limits: StepLimits,
        out_dtype: torch.dtype,
        clock: Clock,
    ) -> None:
        self.key = key
        self.kv = kv
        self.limits = limits
        self.out_dtype = out_dtype
        self.epoch = 0
        self.lengths: tuple[int, ...] = (0,) * len(kv.rows)
        self.closed = False
        self._clock = clock
        self._last_sign = clock.monotonic()
        self._last_step_id = -1
        self._last_answer: Answer | None = None
        self._reordered_by: int | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self.sink: Sink | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def silent_seconds(self) -> float:
        """Time since the client's last sign of life; 0 while a step of its is under way."""
        return 0.0 if self._num_waiting else self._clock.monotonic() - self._last_sign

    def touch(self) -> None:
        """The client lives."""
        self._last_sign = self._clock.monotonic()

    def adopt(self, task: "asyncio.Task[None]") -> None:
        """A step of this session runs in ``task``:

        it ends when the session is closed, not when its stream breaks.
        """
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self) -> None:
        """No step runs or will run after this; the memory is then the caller's to free."""
        self.closed = True
        self._last_answer = None
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def step(self, message: Step, hidden: torch.Tensor, executor: Executor) -> Answer | None:
        """Run a step, or repeat the answer of the last one. None: a frame of an older epoch, to be
        dropped.

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

    async def _step(self, message: Step, hidden: torch.Tensor, executor: Executor) -> Answer | None:
        if self.closed:
            raise SessionClosed("The session was closed.", hint="Open a new one.")
        if message.epoch < self.epoch:
            return None
        self.epoch = message.epoch
        if message.step_id == self._last_step_id and self._last_answer is not None:
            result, kept = self._last_answer
            return msgspec.structs.replace(result, epoch=message.epoch), kept
        if message.step_id <= self._last_step_id:
            raise SessionGap(
                f"Step {message.step_id} is past; the last one was {self._last_step_id}.",
                hint="Step ids only grow within a session.",
            )
        answer = await self._run(message, hidden, executor)
        self._last_step_id, self._last_answer = message.step_id, answer
        return answer

    async def _run(self, message: Step, hidden: torch.Tensor, executor: Executor) -> Answer:
        reorder = message.reorder
        if self._reordered_by == message.step_id:
            # The step failed after its rows had been reordered; a second time would reorder the
            # reordered.
            reorder = None
        plan = plan_step(message.starts, message.counts, reorder, self.lengths, self.limits)
        key = self.key
        work = Work(self.kv, key.blocks, plan, hidden, self.out_dtype, key.peer_id, plan.kind)
        try:
            outcome = await executor.run(work)
        except PetalsError:
            if work.begun:
                self.lengths = plan.starts
                self._reordered_by = message.step_id if message.reorder is not None else None
            raise
        self.lengths = plan.lengths_after
        self._reordered_by = None
        result = StepResult(
            session_id=key.session_id,
            epoch=self.epoch,
            step_id=message.step_id,
            queue_seconds=outcome.queue_seconds,
            compute_seconds=outcome.compute_seconds,
            batch_tokens=outcome.batch_tokens,
        )
        return result, outcome.hidden


class SessionTable:
    """All sessions of a server.

    ``release`` gives a session's memory back once nothing runs in it.
    """

    def __init__(
        self, release: Callable[[SessionKV], None], lease_seconds: float, max_per_peer: int
    ) -> None:
        self._release = release
        self._lease_seconds = lease_seconds
        self._max_per_peer = max_per_peer
        self._sessions: dict[SessionKey, Session] = {}
        self._expected: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __getitem__(self, key: SessionKey) -> Session:
        return self._sessions[key]

    def get(self, key: SessionKey) -> Session | None:
        return self._sessions.get(key)

    def find(self, peer_id: PeerId, session_id: bytes) -> list[Session]:
        """A peer's sessions of one id (several only if it uses our span in several parts)."""
        return [
            s
            for k, s in self._sessions.items()
            if (k.peer_id, k.session_id) == (peer_id, session_id)
        ]

    @contextmanager
    def seat(self, peer_id: PeerId) -> Iterator[None]:
        """Hold a place while a session is being opened.

        Raises PeerBusy if the peer has its share.
        """
        held = sum(key.peer_id == peer_id for key in self._sessions) + self._expected[peer_id]
        if held >= self._max_per_peer:
            raise PeerBusy(
                f"This server lets one client keep {self._max_per_peer} sessions open.",
                hint="Close some, or use another server.",
            )
        self._expected[peer_id] += 1
        try:
            yield
        finally:
            self._expected[peer_id] -= 1
            if not self._expected[peer_id]:
                del self._expected[peer_id]

    def add(self, session: Session) -> None:
        self._sessions[session.key] = session

    async def end(self, session: Session) -> None:
        """Close a session and free its memory. Idempotent."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            await session.close()
            self._release(session.kv)

    def silent(self) -> list[Session]:
        """Sessions whose client has not been heard for longer than the lease."""
        return [s for s in self._sessions.values() if s.silent_seconds > self._lease_seconds]
