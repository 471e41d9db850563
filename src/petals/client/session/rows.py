"""A session's rows in the event loop: where each stands, and what a step may ask.

Rolling back and reordering are recorded here and become part of the next step. The layers of a
step, from outside in: this check, ``supervisor`` (repairs), ``pipeline`` (segments of the route),
``hop`` (one server). Knows no text and no sampling.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.routing.swarm_state import show
from petals.client.session.supervisor import SessionSupervisor
from petals.client.session.types import SessionSpec, Tuning
from petals.client.trace import SessionTrace
from petals.errors import (
    BadInput,
    BatchTooLarge,
    LengthExceeded,
    PetalsError,
    SessionClosed,
    SessionGap,
)
from petals.logs import get_logger
from petals.models.runtime.token_log import RowSlices
from petals.types import BlockSpan
from petals.wire.fields import MAX_ROWS
from petals.wire.tensors import check_states

logger = get_logger(__name__)

_TRAVELLING = (torch.float32, torch.float16, torch.bfloat16)
_KEPT_STEPS = 1024


class SessionRows:
    """One session through ``blocks``, opened at its first step. Await its methods in one loop."""

    def __init__(
        self,
        access: SwarmConnection,
        blocks: BlockSpan,
        *,
        max_length: int | None,
        num_rows: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise BadInput("A session's max_length is at least 1.", hint="Pass max_length=2048.")
        self.blocks = blocks
        self.max_length = max_length
        self.lengths: tuple[int, ...] = (0,) * (num_rows or 0)
        """Tokens in every row; servers may hold more of a row that was rolled back."""
        self._access = access
        self._num_reserved = num_rows
        self._tuning = tuning or Tuning()
        self._dtype, self._hidden_size = torch.float32, 0
        self._supervisor: SessionSupervisor | None = None
        self._reorder: tuple[int, ...] | None = None
        """The reorder that the next step brings: new row r continues row ``_reorder[r]``."""
        self._turn = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop of the first step; in a forked child it is another one."""
        self._end: PetalsError | None = None
        self._step_seconds: deque[float] = deque(maxlen=_KEPT_STEPS)

    @property
    def is_open(self) -> bool:
        """True while servers hold cache for the session."""
        return bool(self._hidden_size) and self._end is None

    @property
    def trace(self) -> SessionTrace:
        """The route, the latest timings and repairs."""
        supervisor = self._supervisor
        if supervisor is None:
            return SessionTrace((), ())
        return SessionTrace(
            hops=tuple(leg.trace for leg in supervisor.state.legs),
            step_seconds=tuple(self._step_seconds),
            edges=supervisor.edges,
            repairs=tuple(supervisor.state.repairs),
        )

    async def step(
        self,
        hidden: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
        rope_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Run ``counts[r]`` tokens of row r from ``starts[r]``, after a ``reorder`` of the rows.

        hidden: [sum(counts), H]; the result has its shape. rope_lengths: of each token, in the same
        order; None: the length of its row after the step. A step that fails changes nothing.
        """
        self._check_process()
        async with self._turn:
            began = perf_counter()
            self._check(hidden, starts, counts, reorder)
            check_states(hidden)
            supervisor, dtype = await self._opened(hidden, len(counts))
            _check_width(hidden, self._hidden_size)
            output, untold = hidden, _after(self._reorder, reorder)
            if hidden.shape[0]:
                # A copy: it is kept, and the caller may write into its own.
                rows = RowSlices.whole_forward(starts, counts, hidden.to(dtype, copy=True))
                if rope_lengths is not None:
                    rows = replace(rows, rope_lengths=tuple(rope_lengths))
                output = await supervisor.run(rows, untold)
                untold = None
                self._step_seconds.append(perf_counter() - began)
            self._reorder = untold
            self.lengths = tuple(start + count for start, count in zip(starts, counts))
            return output.to(hidden.dtype)

    async def fork(self, max_length: int | None = None) -> "SessionRows":
        """Rows of their own that go on from these, for ``max_length`` tokens each (None: as many as
        these). See ``SessionSupervisor.fork``. Raises SessionClosed, LengthExceeded.
        """
        self._check_process()
        async with self._turn:
            if self._end is not None:
                raise self._end
            held = () if self._supervisor is None else self._supervisor.state.confirmed.lengths
            longest = max((*self.lengths, *held), default=0)
            if max_length is not None and max_length < longest:
                raise LengthExceeded(
                    f"A fork of max_length={max_length} of a session with {longest} tokens.",
                    hint="Fork it with a larger max_length.",
                )
            fork = SessionRows(
                self._access,
                self.blocks,
                max_length=max_length or self.max_length,
                num_rows=self._num_reserved,
                tuning=self._tuning,
            )
            fork.lengths, fork._reorder = self.lengths, self._reorder
            if self._supervisor is not None and self._hidden_size:
                fork._supervisor = await self._supervisor.fork(max_length)
                fork.max_length = fork._supervisor.max_length
                fork._dtype, fork._hidden_size = self._dtype, self._hidden_size
            return fork

    async def inputs(
        self, lengths: Sequence[int], reorder: Sequence[int] | None = None
    ) -> RowSlices | None:
        """What was sent to the first block, of the first ``lengths[r]`` tokens of each row after
        ``reorder``. None if there is nothing, or if it was not kept.
        """
        self._check_process()
        async with self._turn:
            if self._supervisor is None or self._supervisor.state.is_closed:
                return None
            log = self._supervisor.state.confirmed
            rows = log.branch(lengths, _after(self._reorder, reorder))
            return None if rows.is_dropped else rows.whole()

    async def close(self) -> None:
        """Free what the servers hold; a step under way fails. Idempotent."""
        if self._end is None:
            self._end = SessionClosed("The session was closed.", hint="Open a new one.")
        if self._supervisor is not None and self._is_ours:
            await self._supervisor.close()

    @property
    def _is_ours(self) -> bool:
        """Whether this process has opened the session, or will."""
        return self._loop in (None, asyncio.get_running_loop())

    def _check_process(self) -> None:
        """Raises SessionClosed in a forked child, for a session of its parent."""
        self._loop = self._loop or asyncio.get_running_loop()
        if not self._is_ours:
            raise SessionClosed(
                "The session was opened before this process was forked; the parent continues it.",
                hint="Open one in this process: with model.inference_session(...) as session.",
            )

    async def _opened(self, hidden: Tensor, num_rows: int) -> tuple[SessionSupervisor, torch.dtype]:
        """The session at the servers, opened at the first step, and how states travel."""
        if self._supervisor is not None and self._hidden_size:
            return self._supervisor, self._dtype
        dtype = hidden.dtype if hidden.dtype in _TRAVELLING else torch.float32
        if self._tuning.prompts is not None:
            _check_width(self._tuning.prompts, hidden.shape[-1])
        swarm = await self._access.view()
        num_reserved = self._num_reserved or num_rows
        spec = SessionSpec(
            model=swarm.model,
            num_rows=num_reserved,
            hidden_size=hidden.shape[-1],
            max_length=self.max_length,
            dtype=dtype,
            active_adapter=swarm.config.active_adapter,
            tuning=self._tuning,
        )
        supervisor = SessionSupervisor(swarm, self.blocks, spec)
        self._supervisor = supervisor
        try:
            if self._end is not None:
                raise self._end
            nothing = (0,) * num_reserved
            await supervisor.run(RowSlices(nothing, nothing, hidden[:0], ()))
        except BaseException:
            self._supervisor = None
            await supervisor.close()
            raise
        self._dtype, self._hidden_size = dtype, hidden.shape[-1]
        self.max_length = supervisor.max_length
        if swarm.config.show_route == "inference":
            route = tuple(leg.hop for leg in supervisor.state.legs)
            logger.info("session through %s", show(route))
        return supervisor, dtype

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
                    f"Maximum length exceeded: {start + count} tokens in a session of "
                    f"max_length={self.max_length}.",
                    hint="Open the session with a larger max_length.",
                )


def _after(first: Sequence[int] | None, second: Sequence[int] | None) -> tuple[int, ...] | None:
    """Two reorders, one after the other, as one."""
    if first is None or second is None:
        chosen = second if first is None else first
        return None if chosen is None else tuple(chosen)
    return tuple(first[row] for row in second)


def _check_width(hidden: Tensor, hidden_size: int) -> None:
    """Raises BadInput unless the last dimension of ``hidden`` is the model's."""
    if hidden.shape[-1] != hidden_size:
        raise BadInput(
            f"Hidden states have {hidden.shape[-1]} values, this model has {hidden_size}.",
            hint="Check that client and servers use the same model.",
        )
