"""Checks of requests, before anything is stored or computed for a peer.

Each check raises the typed error that is sent to the peer. ``PeerByteBudget`` limits the states of
each peer that wait or run on this server. Values of tensors are checked later, on the compute
thread. Knows no streams and no sessions.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from petals.errors import (
    AdapterRefused,
    BadInput,
    BatchTooLarge,
    BlocksNotServed,
    LengthExceeded,
    PeerBusy,
    UnknownModel,
)
from petals.models.adapters.low_rank import Adapter, LowRank, Slot, check_fits
from petals.server.admission.offer import ServedModel
from petals.server.compute.kv_pool import SessionKV
from petals.types import BlockSpan, PeerId
from petals.wire import messages
from petals.wire.passes import Forward, PutAdapter
from petals.wire.requests import OpenSession, ReplayPart
from petals.wire.tensors import DTYPES


def check_request(offer: ServedModel, request: OpenSession | Forward) -> BlockSpan:
    """The blocks of a request, as a span. Raises UnknownModel, BlocksNotServed, ProtocolError."""
    check_model(offer, request.model)
    blocks = messages.span(request.blocks)
    if not offer.blocks.covers(blocks):
        raise BlocksNotServed(
            f"This server has blocks {offer.blocks}, not {blocks}.",
            hint="Its record was read before it moved; look again.",
        )
    return blocks


def check_model(offer: ServedModel, model: str) -> None:
    """Raise UnknownModel unless ``model`` is served."""
    if model != offer.model:
        raise UnknownModel(
            f"This server runs {offer.model}, not {model}.",
            hint="Compare the names in petals status: a repository, or a folder and its config.",
        )


def adapter_of(offer: ServedModel, message: PutAdapter, tensors: Sequence[torch.Tensor]) -> Adapter:
    """The adapter of a message; its names and shapes fit the served blocks.

    Raises UnknownModel, AdapterRefused.
    """
    check_model(offer, message.model)
    parts = message.parts
    if len(tensors) != 2 * len(parts) or not parts:
        raise AdapterRefused(
            f"{len(tensors)} tensors came for {len(parts)} matrices.",
            hint="Send A [rank, in] and B [out, rank] of each.",
        )
    found: dict[Slot, LowRank] = {}
    for part, a, b in zip(parts, tensors[::2], tensors[1::2]):
        if (part.block, part.module) in found or a.shape[:1] != (part.rank,):
            raise AdapterRefused(
                f"The matrices for {part.module[:80]!r} of block {part.block} came twice, or not "
                f"with the rank {part.rank} they were announced with.",
                hint="Send A [rank, in] and B [out, rank] of each, once.",
            )
        found[part.block, part.module] = LowRank(a, b, part.scaling)
    adapter = Adapter(found)
    check_fits(adapter, offer.slots)
    return adapter


def check_size(offer: ServedModel, num_rows: int, max_length: int) -> None:
    """Raise BatchTooLarge or LengthExceeded beyond the limits."""
    if num_rows > offer.max_rows:
        raise BatchTooLarge(
            f"This server takes {offer.max_rows} rows at once, not {num_rows}.",
            hint="Use a smaller batch or fewer beams.",
        )
    if max_length > offer.max_length:
        raise LengthExceeded(
            f"Maximum length exceeded: this server takes sequences of up to {offer.max_length} "
            f"tokens, not {max_length}.",
            hint="Ask for a smaller max_length, or for a server with a larger one.",
        )


def check_pass(offer: ServedModel, request: Forward) -> BlockSpan:
    """The blocks of a pass. Raises what ``check_request`` raises, BatchTooLarge, LengthExceeded,
    BadInput.
    """
    blocks = check_request(offer, request)
    counts = request.counts
    check_size(offer, len(counts), max(counts, default=0))
    if sum(counts) > offer.max_step_tokens:
        raise BatchTooLarge(
            f"A pass of {sum(counts)} tokens is too much, {offer.max_step_tokens} is the limit.",
            hint="Split it into smaller batches.",
        )
    check_num_prompt_tokens(offer, request.num_prompt_tokens)
    taps = request.taps
    if len(set(taps)) < len(taps) or any(block not in blocks for block in taps):
        raise BadInput(
            f"The outputs of blocks {list(taps)[:8]} were asked for, the pass runs {blocks}.",
            hint="Name blocks of the pass, each once.",
        )
    return blocks


def check_num_prompt_tokens(offer: ServedModel, num_tokens: int) -> None:
    """Raise LengthExceeded for deep prompts longer than any row may be."""
    if num_tokens > offer.max_length:
        raise LengthExceeded(
            f"Prompts of {num_tokens} tokens; this server takes {offer.max_length} in a row.",
            hint="Use shorter prompts.",
        )


def pass_tensors(
    offer: ServedModel, request: Forward, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [sum(counts), H] and deep prompts of a pass. Raises BadInput."""
    num_prompts = 1 if request.num_prompt_tokens else 0
    hidden = only_states(offer, tensors[: len(tensors) - num_prompts], sum(request.counts))
    if not num_prompts:
        return hidden, None
    start, end = request.blocks
    shapes: set[tuple[int, ...]] = {
        (end - start, num_rows, request.num_prompt_tokens, offer.hidden_size)
        for num_rows in (1, len(request.counts))
    }
    return hidden, _prompts(tensors[-1], shapes)


def session_prompts(
    offer: ServedModel, request: OpenSession, tensors: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Deep prompts [len(blocks), P, H] of a session, or None. Raises BadInput, LengthExceeded."""
    if not request.num_prompt_tokens:
        check_nothing_more(tensors)
        return None
    check_num_prompt_tokens(offer, request.num_prompt_tokens)
    if len(tensors) != 1:
        raise BadInput(
            f"{len(tensors)} tensors came where the prompts are expected.",
            hint="Send prompts [blocks, prompt tokens, hidden_size].",
        )
    start, end = request.blocks
    return _prompts(tensors[0], {(end - start, request.num_prompt_tokens, offer.hidden_size)})


def _prompts(prompts: torch.Tensor, shapes: set[tuple[int, ...]]) -> torch.Tensor:
    if tuple(prompts.shape) not in shapes or not prompts.dtype.is_floating_point:
        raise BadInput(
            f"Prompts of shape {list(prompts.shape)} and {prompts.dtype} do not fit.",
            hint=f"Floating point of shape {list(min(shapes))} is expected.",
        )
    return prompts


def check_gradients(
    offer: ServedModel, request: Forward, gradients: Sequence[torch.Tensor]
) -> None:
    """Raise BadInput unless there is a tensor [sum(counts), H] for the output and for each tap."""
    expected = 1 + len(request.taps)
    if len(gradients) != expected:
        raise BadInput(
            f"{len(gradients)} gradients came where {expected} are expected.",
            hint="Send one for the output and one for each tap; zeros where there is none.",
        )
    for gradient in gradients:
        only_states(offer, (gradient,), sum(request.counts))


def check_nothing_more(tensors: Sequence[torch.Tensor]) -> None:
    """Raise BadInput if there are tensors."""
    if tensors:
        raise BadInput(
            f"{len(tensors)} tensors came that were not announced.",
            hint="num_prompt_tokens announces prompts; a kept pass needs no inputs.",
        )


def state_dtype(name: str) -> torch.dtype:
    """The dtype that states are sent in. Raises BadInput if it is not a floating-point dtype."""
    dtype = DTYPES.get(name)
    if dtype is None or not dtype.is_floating_point:
        raise BadInput(
            f"Hidden states cannot travel as {name[:32]!r}.",
            hint="Use float32, bfloat16 or float16.",
        )
    return dtype


def only_states(
    offer: ServedModel, tensors: Sequence[torch.Tensor], num_tokens: int
) -> torch.Tensor:
    """The hidden states [num_tokens, H], floating, of a message. Raises BadInput."""
    if len(tensors) != 1:
        raise BadInput(
            f"{len(tensors)} tensors came where one is expected.",
            hint="Send hidden states [tokens, hidden_size].",
        )
    hidden = tensors[0]
    if not hidden.dtype.is_floating_point:
        raise BadInput(
            f"Hidden states are floating point, not {str(hidden.dtype).removeprefix('torch.')}.",
            hint="Token ids go through the model's embeddings first.",
        )
    if tuple(hidden.shape) != (num_tokens, offer.hidden_size):
        raise BadInput(
            f"Hidden states of shape {list(hidden.shape)} came for {num_tokens} tokens of "
            f"{offer.hidden_size} values.",
            hint="Send hidden states [sum(counts), hidden_size] of this model.",
        )
    return hidden


def kv_and_outputs(
    offer: ServedModel,
    kv: SessionKV,
    out_dtype: torch.dtype,
    part: ReplayPart,
    tensors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values of a part's tokens from another server, [sum(counts), KV width], and the
    outputs of its blocks for them, [sum(counts), H], or None if they were not sent. Raises
    BadInput. The values are checked on the compute thread.
    """
    num_tokens, dtype = sum(part.counts), kv.layout.kv_dtype
    wanted = [
        ((num_tokens, kv.layout.kv_width(kv.blocks)), dtype),
        ((num_tokens, offer.hidden_size), out_dtype),
    ]
    came = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    if dtype is None or came not in (wanted, wanted[:1]):
        raise BadInput(
            "The keys and values that came are not in the format of these blocks.",
            hint="Fill the rows from hidden states, or from a server of the same kv_format.",
        )
    return tensors[0], tensors[1] if len(tensors) > 1 else None


class PeerByteBudget:
    """Bytes of states in use by each peer, at most ``max_bytes_per_peer``."""

    def __init__(self, max_bytes_per_peer: int) -> None:
        self._max_bytes = max_bytes_per_peer
        self._used: Counter[PeerId] = Counter()

    @property
    def used_bytes(self) -> int:
        """Bytes of all peers."""
        return self._used.total()

    @contextmanager
    def hold(self, peer: PeerId, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` until the context ends. Raises PeerBusy beyond the budget."""
        self.reserve(peer, num_bytes)
        try:
            yield
        finally:
            self.release(peer, num_bytes)

    def reserve(self, peer: PeerId, num_bytes: int) -> None:
        """Count ``num_bytes`` until ``release``. Raises PeerBusy beyond the budget."""
        if self._used[peer] + num_bytes > self._max_bytes:
            raise PeerBusy(
                "Too many states of this client are being computed.", hint="Wait for answers first."
            )
        self._used[peer] += num_bytes

    def release(self, peer: PeerId, num_bytes: int) -> None:
        """Count ``num_bytes`` as free again."""
        self._used[peer] -= num_bytes
        if not self._used[peer]:
            del self._used[peer]
