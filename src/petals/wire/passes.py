"""Messages of whole passes: sequences that run once, forward and backward, and adapters.

Tensors follow the message they belong to; each docstring says which. Row = one sequence of the
batch; states travel packed, ``[sum(counts), hidden_size]`` in row order.
"""

from typing import Annotated

from msgspec import Meta

from petals.wire.fields import (
    MAX_TENSORS,
    Message,
    PassId,
    PerBlock,
    PerRow,
    Position,
    Seconds,
    ShortText,
    WireBlocks,
)


class Forward(Message, frozen=True):
    """Run whole sequences once, without a session. Tensors: hidden ``[sum(counts), hidden_size]``;
    then, with ``num_prompt_tokens`` P, prompts ``[len(blocks), 1 or len(counts), P, hidden_size]``.

    ``taps`` are blocks (absolute) whose outputs are wanted, too. A pass with a ``pass_id`` is to be
    followed by Backward: what this needs is kept for a while, if there is room.
    """

    model: ShortText
    blocks: WireBlocks
    counts: PerRow
    adapter: ShortText | None = None
    num_prompt_tokens: Position = 0
    taps: PerBlock = ()
    pass_id: PassId | None = None


class ForwardResult(Message, frozen=True):
    """Tensors: hidden ``[sum(counts), hidden_size]``, then one like it for each tap, in order.

    ``kept``: a Backward within ``lease_seconds`` needs no inputs.
    """

    queue_seconds: Seconds
    compute_seconds: Seconds
    kept: bool = False
    lease_seconds: Seconds = 0.0


class Backward(Message, frozen=True):
    """Gradients of a pass; ``forward`` repeats its request. Tensors: the gradients of the output
    and of each tap, ``[sum(counts), hidden_size]``; then, unless the pass is ``kept``, its inputs
    as Forward brings them, from which it is run again.

    ``wants_adapter``: the gradients of the adapter's tensors are wanted as well. A kept pass serves
    one Backward and is gone; one that is gone is refused with PassExpired.
    """

    forward: Forward
    kept: bool = False
    wants_adapter: bool = False


class BackwardResult(Message, frozen=True):
    """Tensors: the gradient of hidden, of prompts (if there were any, in their shape), then those
    of the adapter's tensors, in its order, if wanted.
    """

    queue_seconds: Seconds
    compute_seconds: Seconds
    recomputed: bool = False


class AdapterPart(Message, frozen=True):
    """One matrix of an adapter: ``module`` (a path inside block ``block``), its rank and scale.

    Its output gains ``scaling * (x @ A.T) @ B.T``.
    """

    block: Position
    module: ShortText
    rank: Annotated[int, Meta(ge=1, le=4096)]
    scaling: Annotated[float, Meta(ge=-1e6, le=1e6)]


class PutAdapter(Message, frozen=True):
    """Keep a low-rank adapter for this client's sessions and passes, under the digest of its
    content. Tensors: A ``[rank, in]`` and B ``[out, rank]`` of each part, in order.

    Answered by AdapterKept, also if it was there already.
    """

    model: ShortText
    adapter: ShortText
    parts: Annotated[tuple[AdapterPart, ...], Meta(max_length=MAX_TENSORS // 2)]


class AdapterKept(Message, frozen=True):
    """The adapter can be named from now on, until ``lease_seconds`` after the client's last use."""

    adapter: ShortText
    lease_seconds: Seconds
