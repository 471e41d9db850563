"""A session for synchronous callers: step through remote blocks, roll back, fork, close.

The whole of a step is one crossing into the event loop. Knows hidden states; knows no model, no
text and no sampling (``output_ids`` is only kept here for its owner).
"""

import weakref
from collections.abc import Sequence

from torch import Tensor

from petals.client.connection.event_loop import bridge
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.trace import SessionTrace
from petals.errors import BadInput, NotSupported
from petals.types import BlockSpan


class InferenceSession:
    """KV caches at the servers of ``blocks`` (default: all of the manager's), and where they stand.

    Room for ``max_length`` tokens in each of ``num_rows`` rows (default: as many as the first step
    brings) is reserved at the first step; with None it is taken as the rows grow, and a step may
    meet CacheFull. ``tuning`` is what blocks add for this client alone. Use the session as a
    context manager, or ``close`` it.

    ``output_ids`` ([rows, tokens] int64) and ``past_key_values`` belong to whoever generates.
    """

    def __init__(
        self,
        manager: RemoteSequenceManager,
        blocks: BlockSpan | None = None,
        *,
        max_length: int | None,
        num_rows: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.manager = manager
        self.blocks = blocks or manager.blocks
        self.output_ids: Tensor | None = None
        self.past_key_values: object | None = None
        self._rows = SessionRows(
            manager.access,
            self.blocks,
            max_length=max_length,
            num_rows=num_rows,
            tuning=tuning,
        )
        self._dropped = weakref.finalize(self, _close_soon, self._rows)
        self._dropped.atexit = False

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def max_length(self) -> int | None:
        """Most tokens in a row; None until servers have said so, if none was asked for."""
        return self._rows.max_length

    @property
    def num_rows(self) -> int | None:
        """Rows the session has now; None if that is left to its first step."""
        return len(self._rows.lengths) or None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in every row; empty before the first step."""
        return self._rows.lengths

    @property
    def position(self) -> int:
        """Tokens in the longest row. Set it back to roll back: that rides on the next step.

        Setting raises SessionGap for a position that was never reached.
        """
        return max(self._rows.lengths, default=0)

    @position.setter
    def position(self, position: int) -> None:
        self._rows.rewind(position)

    @property
    def last_token_id(self) -> Tensor | None:
        """The last column of ``output_ids``."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @last_token_id.setter
    def last_token_id(self, value: Tensor) -> None:
        if self.output_ids is None:
            raise BadInput("The session has no output yet.", hint="Call generate() first.")
        self.output_ids[:, -1:] = value

    @property
    def trace(self) -> SessionTrace:
        """Route and timings of the latest steps."""
        return self._rows.trace

    def step(
        self,
        inputs: Tensor,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """Run tokens through the blocks, after those already in the cache.

        inputs: [batch, tokens, hidden] floating; tokens may be 0. hypo_ids: [batch] int64, the row
        each row continues. Returns [batch, tokens, hidden], same dtype and device.
        Raises BadInput, LengthExceeded, BatchTooLarge, RouteError, CacheFull, PeerError,
        SessionClosed, and NotSupported for prompts: a session is opened with them.
        """
        if prompts is not None and prompts.numel():
            raise NotSupported(
                "A session's deep prompts cannot change from step to step.",
                hint="Open it with them: model.inference_session(..., prompts=prompts).",
            )
        if inputs.dim() != 3:
            raise BadInput(
                f"Inputs are [batch, tokens, hidden], not {list(inputs.shape)}.",
                hint="A single sequence has batch 1: inputs[None].",
            )
        batch, tokens, hidden_size = inputs.shape
        reorder = None if hypo_ids is None else [int(row) for row in hypo_ids.flatten().tolist()]
        lengths = self._rows.lengths or (0,) * batch
        if reorder is not None and all(0 <= row < len(lengths) for row in reorder):
            lengths = tuple(lengths[row] for row in reorder)
        packed = inputs.reshape(batch * tokens, hidden_size)
        output = self.step_rows(packed, starts=lengths, counts=(tokens,) * batch, reorder=reorder)
        return output.reshape(inputs.shape)

    def step_rows(
        self,
        hidden: Tensor,
        *,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: Sequence[int] | None = None,
    ) -> Tensor:
        """Run ``counts[r]`` tokens of row r from position ``starts[r]``; rows may differ.

        hidden: [sum(counts), hidden] floating, row after row; returns the same shape, dtype and
        device. A start before the row's end rolls it back. ``reorder[r]`` is the old row that new
        row r continues; it is applied first. All of it is checked before anything is sent. Raises
        like ``step``, and SessionGap for a start beyond the row's end.
        """
        identity = reorder is None or list(reorder) == list(range(len(self._rows.lengths)))
        output = bridge.run(
            self._rows.step(
                hidden.detach(), tuple(starts), tuple(counts), None if identity else reorder
            )
        )
        return output.to(hidden.device)

    def close(self) -> None:
        """Free what the servers hold. Idempotent; a step afterwards raises SessionClosed."""
        self._dropped.detach()
        bridge.run(self._rows.close())


def _close_soon(rows: SessionRows) -> None:
    """A session that was forgotten, in whatever thread that was noticed."""
    if rows.is_open:
        bridge.start(rows.close)
