"""A batch of whole sequences: it is cut into micro-batches, each with a route of its own.

A route of n hops gets about 2 n micro-batches, so that all of its servers compute at the same time.
Where the servers accept less at once, the micro-batches are halved. Gradients are summed in the
order of the rows, so that every run gives the same bits. Knows no model and no optimizer.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from petals.client.routing.route import Needs
from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.routing.swarm_state import SwarmState
from petals.client.training.hop_call import Gradients, PassCall, PassOutput
from petals.client.training.micro_batch import LostPeers, MicroBatch
from petals.errors import BatchTooLarge, NotSupported
from petals.swarm.background import gather_bounded
from petals.types import BlockSpan

MAX_TOKENS = 1024
"""Upper limit of a micro-batch, in tokens."""

MIN_TOKENS = 64
"""Lower limit of a micro-batch, in tokens: with fewer, the message costs more than the product."""

MAX_ROWS = 128
"""Upper limit of a micro-batch, in rows; below the limit of rows of any server."""

_PER_HOP = 2
"""Micro-batches per hop of a route: one is computed while the next one travels."""

MAX_AT_ONCE = 8
"""Micro-batches of one pass under way at the same time."""


class Pass:
    """Whole sequences through ``blocks``: ``forward`` once, then ``backward`` as often as asked.

    Await its methods one at a time.
    """

    def __init__(
        self, access: SwarmConnection, blocks: BlockSpan, call: PassCall, *, is_training: bool
    ) -> None:
        self._access = access
        self._blocks = blocks
        self._call = call
        self._is_training = is_training
        self._loop: asyncio.AbstractEventLoop | None = None
        self._parts: list[tuple[int, ...]] = []
        self._batches: list[MicroBatch] = []

    async def forward(self, hidden: Tensor) -> PassOutput:
        """hidden: [sum(counts), H], and so are the outputs.

        Raises RouteError, the servers' refusals, PeerError after ``max_retries``.
        """
        self._loop = asyncio.get_running_loop()
        view = await self._access.view()
        needs = Needs(blocks=self._blocks, model=view.model, is_training=self._is_training)
        num_hops = len(await view.route(needs, throughput=True))
        limit = micro_batch_tokens(hidden.shape[0], num_hops)
        while True:
            self._cut(view, limit)
            try:
                outputs = await self._forward(hidden)
                break
            except BatchTooLarge:
                # Some servers take less at once than most do.
                if all(len(part) == 1 for part in self._parts):
                    raise
                limit = min(limit, max(map(sum, self._parts))) // 2
        return PassOutput(
            torch.cat([output.hidden for output in outputs]),
            {
                block: torch.cat([output.tapped[block] for output in outputs])
                for block in self._call.taps
            },
        )

    async def backward(self, grads: PassOutput) -> Gradients:
        """Gradients of what ``forward`` was given, from those of what it gave. Raises likewise, and
        NotSupported in a process that was forked in between.
        """
        if self._loop is not asyncio.get_running_loop():  # a forked child has one of its own
            raise NotSupported(
                "The forward pass was run before this process was forked.",
                hint="Run both passes in the same process.",
            )
        tapped = {block: self._split(grad) for block, grad in grads.tapped.items()}
        works = []
        for number, (batch, piece) in enumerate(zip(self._batches, self._split(grads.hidden))):
            taps = {block: pieces[number] for block, pieces in tapped.items()}
            works.append(partial(batch.backward, PassOutput(piece, taps)))
        found = await gather_bounded(works, MAX_AT_ONCE)
        return Gradients(
            torch.cat([part.hidden for part in found]),
            self._joined([part.prompts for part in found if part.prompts is not None]),
            tuple(_sum(same) for same in zip(*(part.adapter for part in found), strict=True)),
        )

    def _cut(self, view: SwarmState, limit: int) -> None:
        self._parts = list(micro_batches(self._call.counts, limit))
        lost = LostPeers()
        self._batches = [
            MicroBatch(view, self._blocks, call, is_training=self._is_training, lost=lost)
            for call in _shares(self._call, self._parts)
        ]

    async def _forward(self, hidden: Tensor) -> list[PassOutput]:
        pieces = zip(self._batches, self._split(hidden))
        works = [partial(batch.forward, piece) for batch, piece in pieces]
        return await gather_bounded(works, MAX_AT_ONCE)

    def _split(self, packed: Tensor) -> Sequence[Tensor]:
        return torch.split(packed, [sum(part) for part in self._parts])

    def _joined(self, prompts: list[Tensor]) -> Tensor | None:
        """The gradients of prompts that rows share, or that are theirs alone, as one."""
        if self._call.prompts is None:
            return None
        if self._call.prompts.shape[1] == 1:
            return _sum(prompts)
        return torch.cat(prompts, dim=1)


def micro_batch_tokens(num_tokens: int, num_hops: int) -> int:
    """Tokens of a micro-batch of ``num_tokens`` in all, on routes of about ``num_hops``."""
    share = -(-num_tokens // (_PER_HOP * max(1, num_hops)))
    return min(MAX_TOKENS, max(MIN_TOKENS, share))


def micro_batches(counts: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Rows, in order, in groups of at most ``limit`` tokens and MAX_ROWS rows; a longer row goes by
    itself.
    """
    group: list[int] = []
    for count in counts:
        if group and (sum(group) + count > limit or len(group) == MAX_ROWS):
            yield tuple(group)
            group = []
        group.append(count)
    if group:
        yield tuple(group)


def _shares(call: PassCall, parts: Sequence[tuple[int, ...]]) -> Iterator[PassCall]:
    """The call for each group of rows."""
    prompts, row = call.prompts, 0
    for part in parts:
        own = prompts
        if prompts is not None and prompts.shape[1] > 1:
            own = prompts[:, row : row + len(part)]
        yield replace(call, counts=part, prompts=own)
        row += len(part)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other: the order decides the last bits."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
