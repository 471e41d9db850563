"""One session on its course: the path it has now, its epoch, and the rows that servers hold.

What recovery and hand-over share, and how rows get to hops that lack them. Decides nothing.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from petals.client.routing.swarm_state import SwarmView
from petals.client.session.hop import HopSession
from petals.client.session.input_log import KeptInputs, Part, cut
from petals.client.session.pending import Refilling
from petals.client.session.pipeline import SessionPath
from petals.client.session.types import Held, Refill, StepCall, Terms

_SENT_AHEAD = 8
"""Parts of a replay that a server may have waiting."""


@dataclass(slots=True, eq=False)
class Course:
    """``told`` are the rows as servers have them between two steps; ``is_stale``: they have others.

    Who holds ``turn`` is alone with the path: no step is under way.
    """

    swarm: SwarmView
    terms: Terms
    path: SessionPath | None = None
    epoch: int = 0
    told: KeptInputs = field(default_factory=lambda: KeptInputs(0))
    is_stale: bool = False
    step_ids: Iterator[int] = field(default_factory=lambda: count(1))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def piece_tokens(self, hops: Sequence[HopSession]) -> int:
        """Tokens of a piece: what these servers take, and less where hops can share the work.

        0: no limit.
        """
        limits = [hop.info.max_batch_tokens for hop in hops]
        if self.path is not None and len(self.path.hops) > 1:
            limits.append(self.swarm.config.prefill_chunk_tokens)
        return min((limit for limit in limits if limit), default=0)


async def refill_from_us(
    path: SessionPath,
    refilling: Refilling,
    parts: Sequence[Part],
    *,
    held: Held | None = None,
    reordered: bool = False,
) -> None:
    """Feed ``parts`` of the session's own inputs to hops that stand at the beginning.

    ``held`` is what these have already; None: nothing in as many rows. Raises what
    ``SessionPath.refill`` raises.
    """

    async def send(some: Sequence[Part]) -> None:
        for part in some:
            call = StepCall(
                refilling.step_id,
                part.starts,
                part.counts,
                reorder=held.rows if held is not None and part is parts[0] else None,
                refill=Refill.LAST if part is some[-1] else Refill.YES,
                reordered=reordered,
            )
            await refilling.hops[0].send(call, part.hidden, refilling.next_hops)

    for at in range(0, len(parts), _SENT_AHEAD):
        await path.refill(refilling, partial(send, parts[at : at + _SENT_AHEAD]))


def in_pieces(part: Part | None, limit: int) -> list[Part]:
    """``part``, if there is anything, in parts of at most ``limit`` tokens."""
    return [] if part is None else list(cut(part, limit))
