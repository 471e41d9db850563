"""Blocks whose outputs show every token, and the compute thread of a server without a thread.

A toy block keeps its inputs like keys and values are kept; a key also shows the token's rope
length. The output of a token is an integer below a prime that depends on all tokens of the row up
to it, on their positions and rope lengths, so that one token that is lost, doubled, misplaced or
run as part of another forward changes the outputs of all tokens after it. Sums are exact, so
outputs are compared bit by bit.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from petals.clock import Clock
from petals.errors import PeerFailed
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import BlockLayout, KVLayout
from petals.models.runtime.span import Mode
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.compute.device import DeviceContext
from petals.server.compute.jobs import Outcome
from petals.server.compute.step_job import StepJob
from petals.types import BlockSpan

T = TypeVar("T")

RunToken = tuple[int, int]
"""The number of a token, and its rope length."""

WIDTH = 2
_PRIME = 8191
"""Values are below it, so float32 keeps them exactly."""


NOTHING = torch.empty(0, WIDTH)
"""The hidden states of no tokens."""


def layout_of(blocks: BlockSpan) -> KVLayout:
    """What toy blocks keep of a token: its input as a value, and a key made of it."""
    block = BlockLayout(key_shape=(1, WIDTH), value_shape=(1, WIDTH))
    return KVLayout(span=blocks, blocks=(block,) * len(blocks))


def token_states(numbers: Sequence[int]) -> Tensor:
    """The hidden states [n, WIDTH] of tokens with these numbers."""
    values = torch.tensor(numbers, dtype=torch.int64)
    return torch.stack([(values * 31 + 7) % _PRIME, (values * 17 + 5) % _PRIME], 1).float()


@lru_cache(4096)
def whole_outputs(tokens: tuple[RunToken, ...], num_blocks: int) -> Tensor:
    """What the first ``num_blocks`` blocks make of a row of these tokens, all at once: [n, WIDTH].
    Not to be changed in place.
    """
    if not num_blocks:
        return token_states([number for number, _ in tokens])
    hidden = whole_outputs(tokens, num_blocks - 1)
    return _outputs(num_blocks - 1, _keys(hidden, [length for _, length in tokens]), hidden)


def _keys(hidden: Tensor, rope_lengths: Sequence[int]) -> Tensor:
    """Keys [n, WIDTH] of tokens with these states and rope lengths."""
    lengths = torch.tensor(rope_lengths, dtype=torch.int64).unsqueeze(1)
    return ((hidden.long() + 13 * lengths) % _PRIME).float()


def _outputs(block: int, keys: Tensor, values: Tensor) -> Tensor:
    """Outputs [n, WIDTH] of all tokens of a row whose keys and values are given."""
    at = torch.arange(1, len(keys) + 1).unsqueeze(1)
    weighted = (at * at + 3 * at + block) % _PRIME * keys.long() + (at + 5) * values.long().flip(1)
    sums = weighted.cumsum(0) % _PRIME
    return ((sums * (block + 2) + keys.long() * 5 + at * 11 + block) % _PRIME).float()


class ToySpan:
    """Runs toy blocks over the rows of a server (``compute.device.Runner``)."""

    mode = Mode.PACKED
    weights: frozenset[int] = frozenset()

    def __init__(self, blocks: BlockSpan) -> None:
        self.blocks = blocks

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> list[Tensor]:
        outputs = []
        for segment in segments:
            hidden, row = segment.hidden, segment.row
            assert row is not None
            for block in range(segment.blocks.start, segment.blocks.end):
                new = _keys(hidden, segment.given_rope_lengths)
                keys, values = row.append(
                    block, segment.start, new.unsqueeze(0), hidden.unsqueeze(0)
                )
                hidden = _outputs(block, keys[0], values[0])[segment.start :]
            row.commit(segment.end)
            outputs.append(hidden)
        return outputs

    def trace(self, segments: Sequence[Segment]) -> list[Tensor]:
        raise AssertionError("toy blocks are not trained")


class InlineExecutor:
    """``compute.executor.Executor`` in the event loop: work takes virtual time, one after another.

    seconds: what a step takes. num_failures: so many of the next steps fail in the middle.
    """

    step_seconds = 0.0
    waiting_tokens = 0

    def __init__(self, blocks: BlockSpan, clock: Clock, seconds: float) -> None:
        self.seconds = seconds
        self.num_failures = 0
        self._clock = clock
        self._turn = asyncio.Lock()
        budget = ActivationBudget(0)
        device = torch.device("cpu")
        self._device = DeviceContext(ToySpan(blocks), device, torch.float32, budget)

    async def run(self, job: StepJob) -> Outcome[Tensor]:
        """See ``Executor.run``."""
        await asyncio.sleep(0)
        job.prepare(self._device)
        try:
            async with self._turn:
                await self._clock.sleep(self.seconds)
            num_tokens = job.plan.num_tokens
            job.accept(num_tokens, self._device.runner.run(job.segments(num_tokens)))
            if self.num_failures:
                self.num_failures -= 1
                raise PeerFailed("The server failed in the middle of a step.")
            return Outcome(job.result(), 0.0, self.seconds, num_tokens)
        except (asyncio.CancelledError, PeerFailed):
            job.abort()
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """See ``Executor.call``."""
        await asyncio.sleep(0)
        return function()

    async def call_on_device(self, function: Callable[[DeviceContext], T]) -> T:
        """See ``Executor.call_on_device``."""
        return await self.call(lambda: function(self._device))

    def post(self, function: Callable[[], object]) -> None:
        """See ``Executor.post``."""
        asyncio.get_running_loop().call_soon(function)
