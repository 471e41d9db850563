"""Where a session's time went, hop by hop.

Plain values; knows nothing of how they were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from statistics import median

from petals.types import BlockSpan, PeerId, Route


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One step at one hop, in seconds; queue and compute are the server's own measurements."""

    step_id: int
    num_tokens: int
    total_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class HopTrace:
    """The latest steps of one hop, and whether our own stream to it goes through a relay."""

    peer_id: PeerId
    blocks: BlockSpan
    steps: tuple[StepTiming, ...]
    is_relayed: bool = False

    def median_seconds(self, part: str = "total") -> float:
        """Median over the steps of ``part``: "total", "queue" or "compute"; 0 before the first."""
        return median_of([getattr(step, f"{part}_seconds") for step in self.steps])

    @property
    def overhead_seconds(self) -> float:
        """Median of what a step took beyond queue and compute: link, framing, hand-overs."""
        return median_of(
            [s.total_seconds - s.queue_seconds - s.compute_seconds for s in self.steps]
        )


class Way(StrEnum):
    """How states get from one server to the next."""

    DIRECT = "direct"
    RELAYED = "relayed"
    VIA_CLIENT = "via the client"


@dataclass(frozen=True, slots=True)
class EdgeTrace:
    """Two hops that follow each other, and the way between them now."""

    near: PeerId
    far: PeerId
    way: Way


@dataclass(frozen=True, slots=True)
class Repair:
    """A hop that was lost and what took its place, in ``stall_seconds`` without progress."""

    peer_id: PeerId
    blocks: BlockSpan
    reason: str
    replaced_by: Route
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """A snapshot of a session: its route and the latest of its steps (about a thousand)."""

    hops: tuple[HopTrace, ...]
    step_seconds: tuple[float, ...]
    edges: tuple[EdgeTrace, ...] = ()
    repairs: tuple[Repair, ...] = ()

    def __str__(self) -> str:
        """The route; a way between two servers is named where it is not direct."""
        arrows = [" → " if edge.way is Way.DIRECT else f" → ({edge.way}) → " for edge in self.edges]
        words = [
            f"{hop.blocks} at …{hop.peer_id[-6:]} ({hop.median_seconds() * 1e3:.1f} ms)"
            for hop in self.hops
        ]
        pairs = zip_longest(words, arrows[: len(words)], fillvalue="")
        return "".join(part for pair in pairs for part in pair)


def median_of(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return median(values) if values else 0.0
