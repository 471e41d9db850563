"""A session's rows in the event loop: where each stands, what a step may ask, how it is cut.

Rolling back and reordering are recorded here and ride on the next step. The layers of a step, from
outside in: check, cut into chunks, walk the path, one hop. Knows no text and no sampling.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from petals.client.hop import StepCall, Terms, check_states, check_width
from petals.client.path import SessionPath, open_path
from petals.client.sequence_manager import SwarmAccess
from petals.client.swarm_view import show
from petals.client.trace import SessionTrace
from petals.errors import (
    BadInput,
    BatchTooLarge,
    LengthExceeded,
    PetalsError,
    RequestError,
    SessionClosed,
    SessionGap,
)
from petals.logs import get_logger
from petals.types import SESSION_ID_BYTES, BlockSpan, SessionId
from petals.wire.messages import MAX_ROWS

logger = get_logger(__name__)

_TRAVELLING = (torch.float32, torch.float16, torch.bfloat16)
_KEPT_STEPS = 1024


class SessionRows:
    """One session through ``blocks``, opened at its first step. Await its methods in one loop."""

    def __init__(
        self,
        access: SwarmAccess,
        blocks: BlockSpan,
        *,
        max_length: int | None,
        num_rows: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise BadInput("A session's max_length is at least 1.", hint="Pass max_length=2048.")
        self.blocks = blocks
        self.max_length = max_length
        self.lengths: tuple[int, ...] = (0,) * (num_rows or 0)
        """Tokens in every row; servers may hold more of a row that was rolled back."""
        self._access = access
        self._num_reserved = num_rows
        self._dtype: torch.dtype | None = None
        self._path: SessionPath | None = None
        self._next_step_id = 0
        self._turn = asyncio.Lock()
        self._end: PetalsError | None = None
        self._step_seconds: deque[float] = deque(maxlen=_KEPT_STEPS)

    @property
    def is_open(self) -> bool:
        """True while servers hold room for us."""
        return self._path is not None and self._end is None

    @property
    def trace(self) -> SessionTrace:
        """The route and the latest timings."""
        hops = () if self._path is None else tuple(hop.trace for hop in self._path.hops)
        return SessionTrace(hops, tuple(self._step_seconds))

    def rewind(self, position: int) -> None:
        """Roll rows longer than ``position`` back to it. Raises SessionGap if none is that long."""
        longest = max(self.lengths, default=0)
        if not 0 <= position <= longest:
            raise SessionGap(
                f"Position {position} was never reached; the session stands at {longest}.",
                hint="A session's position can only be set back.",
            )
        self.lengths = tuple(min(length, position) for length in self.lengths)

    async def step(
        self,
        hidden: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
    ) -> Tensor:
        """See ``InferenceSession.step_rows``."""
        async with self._turn:
            began = perf_counter()
            self._check(hidden, starts, counts, reorder)
            check_states(hidden)
            path = await self._ready(hidden, len(counts))
            check_width(hidden, path.hidden_size)
            if reorder is not None:
                path.note_reorder(reorder)
            self.lengths = tuple(starts)
            if not hidden.shape[0]:
                return hidden
            try:
                output = await self._walk(path, hidden.to(self._dtype), starts, counts)
            except BaseException as error:
                if not isinstance(error, RequestError) and path.lost_reorder:
                    self._end = SessionClosed(
                        "A step that reordered rows was interrupted; where they stand is unknown.",
                        hint="Open a new session.",
                    )
                raise
            self.lengths = tuple(s + c for s, c in zip(starts, counts))
            self._step_seconds.append(perf_counter() - began)
            return output.to(hidden.dtype)

    async def close(self) -> None:
        """Free what the servers hold; a step under way fails. Idempotent."""
        if self._end is None:
            self._end = SessionClosed("The session was closed.", hint="Open a new one.")
        if self._path is not None:
            await self._path.close()

    async def _ready(self, hidden: Tensor, num_rows: int) -> SessionPath:
        """The open path; opens it at the first step."""
        if self._path is not None:
            return self._path
        self._dtype = hidden.dtype if hidden.dtype in _TRAVELLING else torch.float32
        view = await self._access.view()
        terms = Terms(
            session_id=SessionId(secrets.token_bytes(SESSION_ID_BYTES)),
            model=view.model,
            num_rows=self._num_reserved or num_rows,
            max_length=self.max_length,
            dtype=self._dtype,
            adapter=view.config.active_adapter,
        )
        path = await open_path(view, self.blocks, terms)
        if self._end is not None:
            await path.close()
            raise self._end
        self._path = path
        self.max_length = self._path.max_length
        if view.config.show_route == "inference":
            logger.info("session through %s", show(path.route))
        return self._path

    def _check(
        self,
        hidden: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None,
    ) -> None:
        """Raise unless the step can follow; nothing has been sent or recorded yet."""
        if self._end is not None:
            raise self._end
        lengths = self.lengths or (0,) * len(counts)
        if reorder is not None:
            if not all(0 <= row < len(lengths) for row in reorder):
                raise BadInput(f"A reorder names rows 0 to {len(lengths) - 1}.", hint="hypo_ids")
            lengths = tuple(lengths[row] for row in reorder)
        if len(counts) > MAX_ROWS:
            raise BatchTooLarge(
                f"{len(counts)} rows in one session; {MAX_ROWS} is the most.",
                hint="Use several sessions.",
            )
        if not len(starts) == len(counts) == len(lengths):
            raise BadInput(
                f"The session has {len(lengths)} rows; the step names {len(counts)}.",
                hint="A session keeps its batch size; use reorder to change it.",
            )
        if hidden.dim() != 2 or hidden.shape[0] != sum(counts) or min(counts, default=0) < 0:
            raise BadInput(
                f"Hidden states {list(hidden.shape)} for {sum(counts)} tokens.",
                hint="They are packed: [sum(counts), hidden_size].",
            )
        for start, count, length in zip(starts, counts, lengths):
            if not 0 <= start <= length:
                raise SessionGap(
                    f"A step from position {start} does not follow position {length}.",
                    hint="Begin where the row ends, or before (that rolls it back).",
                )
            if self.max_length is not None and start + count > self.max_length:
                raise LengthExceeded(
                    f"{start + count} tokens in a session of max_length={self.max_length}.",
                    hint="Open the session with a larger max_length.",
                )

    async def _walk(
        self, path: SessionPath, hidden: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """One step, or a long one cut so that the hops work on its chunks at the same time."""
        limits = [path.max_step_tokens]
        if len(path.hops) > 1:
            limits.append(self._access.config.prefill_chunk_tokens)
        limit = min((limit for limit in limits if limit), default=0)
        if not limit or hidden.shape[0] <= limit:
            return await path.step(self._call(tuple(starts), tuple(counts)), hidden)
        calls = [self._call(*piece) for piece in _cut(starts, counts, limit)]
        chunks = torch.split(hidden, [call.num_tokens for call in calls])
        under_way = asyncio.Semaphore(len(path.hops) + 1)

        async def run(call: StepCall, chunk: Tensor) -> Tensor:
            async with under_way:
                return await path.step(call, chunk)

        tasks = [asyncio.create_task(run(*work)) for work in zip(calls, chunks)]
        try:
            return torch.cat(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _call(self, starts: tuple[int, ...], counts: tuple[int, ...]) -> StepCall:
        self._next_step_id += 1
        return StepCall(self._next_step_id, starts, counts)


def _cut(
    starts: Sequence[int], counts: Sequence[int], limit: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(starts, counts) of successive steps of at most ``limit`` tokens, in packed order."""
    done = [0] * len(counts)
    while done != list(counts):
        room = limit
        begun = tuple(start + have for start, have in zip(starts, done))
        taken = []
        for row, count in enumerate(counts):
            taken.append(min(room, count - done[row]))
            room -= taken[row]
            done[row] += taken[row]
        yield begun, tuple(taken)
