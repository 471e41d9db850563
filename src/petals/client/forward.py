"""Whole sequences once through remote blocks, without a session.

A batch is cut into micro-batches of whole rows, each on a route of its own, so that many servers
share the work. A server that fails is replaced from where it failed: the input of every hop is at
hand. Knows no gradients and no tokens.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from petals.client.bridge import bridge
from petals.client.hop import BLOCKS_SERVICE
from petals.client.routing import Needs
from petals.client.sequence_manager import SwarmAccess
from petals.client.states import check_states, is_finite
from petals.client.swarm_view import SwarmView
from petals.errors import (
    BadInput,
    BlocksNotServed,
    CacheFull,
    NoCapacity,
    PeerError,
    PeerMisbehaved,
    PetalsError,
    RequestError,
    SessionError,
)
from petals.types import BlockSpan, Hop, PeerId
from petals.wire.passes import Forward, ForwardResult

MICRO_BATCH_TOKENS = 1024
MICRO_BATCH_ROWS = 128
"""Fewer than any server's limit of rows at once."""

_MAX_AT_ONCE = 8


def run_whole(
    access: SwarmAccess, blocks: BlockSpan, hidden: Tensor, counts: Sequence[int]
) -> Tensor:
    """Run whole sequences through ``blocks`` and keep nothing on the servers.

    hidden: [sum(counts), H] floating, row after row; returns the same shape, dtype and device.
    Raises BadInput, RouteError, the servers' refusals, PeerError after ``max_retries``.
    """
    if hidden.dim() != 2 or hidden.shape[0] != sum(counts):
        raise BadInput(
            f"Hidden states {list(hidden.shape)} for {sum(counts)} tokens.",
            hint="They are packed: [sum(counts), hidden_size].",
        )
    check_states(hidden)
    work = run_rows(access, blocks, hidden.detach(), tuple(counts))
    return bridge.run(work).to(hidden.device)


async def run_rows(
    access: SwarmAccess, blocks: BlockSpan, hidden: Tensor, counts: tuple[int, ...]
) -> Tensor:
    """``run_whole`` for callers in the event loop."""
    view = await access.view()
    at_once = asyncio.Semaphore(_MAX_AT_ONCE)

    async def run(part: Tensor, part_counts: tuple[int, ...]) -> Tensor:
        async with at_once:
            return await _Pass(view, part_counts).run(blocks, part)

    parts = list(micro_batches(counts, MICRO_BATCH_TOKENS))
    pieces = torch.split(hidden, [sum(part) for part in parts]) if parts else ()
    tasks = [asyncio.create_task(run(*work)) for work in zip(pieces, parts)]
    if not tasks:
        return hidden
    try:
        return torch.cat(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def micro_batches(counts: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Rows, in order, in groups of at most ``limit`` tokens and MICRO_BATCH_ROWS rows; a longer
    row goes by itself.
    """
    group: list[int] = []
    for count in counts:
        if group and (sum(group) + count > limit or len(group) == MICRO_BATCH_ROWS):
            yield tuple(group)
            group = []
        group.append(count)
    if group:
        yield tuple(group)


class _Pass:
    """One micro-batch on its way, and what its attempts have taught."""

    def __init__(self, view: SwarmView, counts: tuple[int, ...]) -> None:
        self._view = view
        self._counts = counts
        self._refused: dict[PeerId, PetalsError] = {}
        self._num_failures = 0

    async def run(self, blocks: BlockSpan, hidden: Tensor) -> Tensor:
        needs = Needs(blocks=blocks, model=self._view.model)
        while len(needs.blocks):
            try:
                route = await self._view.route(needs, throughput=True)
            except NoCapacity:
                raise next(reversed(self._refused.values())) from None
            for hop in route:
                try:
                    hidden = await self._visit(hop, hidden)
                except PetalsError as error:
                    await self._learn(hop, error)
                    break
                needs = replace(needs, blocks=BlockSpan(hop.blocks.end, blocks.end))
            needs = replace(needs, exclude=frozenset(self._refused))
        return hidden

    async def _visit(self, hop: Hop, hidden: Tensor) -> Tensor:
        view, config = self._view, self._view.config
        channel = await view.channels.take(hop.peer_id, BLOCKS_SERVICE, config.connect_timeout)
        message = Forward(
            model=view.model,
            blocks=(hop.blocks.start, hop.blocks.end),
            counts=self._counts,
            adapter=config.active_adapter,
        )
        try:
            _, tensors = await channel.request(
                message, (hidden,), expect=ForwardResult, timeout=config.request_timeout
            )
        except (RequestError, SessionError):
            await view.channels.give(channel)
            raise
        except BaseException:
            await channel.close()  # its answer may still come, and would be taken for another's
            raise
        await view.channels.give(channel)
        if len(tensors) != 1 or tensors[0].shape != hidden.shape or not is_finite(tensors[0]):
            raise PeerMisbehaved(
                f"The server of blocks {hop.blocks} answered with states that cannot be right.",
                hint="It is avoided from now on; report it to whoever runs the swarm.",
                peer_id=hop.peer_id,
            )
        return tensors[0].to(hidden.dtype)

    async def _learn(self, hop: Hop, error: PetalsError) -> None:
        """Remember why a server is no choice now. Raises the error if no other can help."""
        match error:
            case BadInput():
                raise error
            case BlocksNotServed():
                self._refused[hop.peer_id] = error
                await self._view.refresh()
            case RequestError() | CacheFull():
                self._refused[hop.peer_id] = error
            case PeerError():
                self._num_failures += 1
                self._view.note_failure(hop.peer_id, error)
                if self._num_failures > self._view.config.num_retries:
                    raise error
                await asyncio.sleep(self._view.config.backoff_seconds(self._num_failures))
            case _:
                raise error
