"""How the time of a session was spent, hop by hop, and how it was repaired.

Values only; knows nothing of how they were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from statistics import median

from petals.types import BlockSpan, PeerId, Route


@dataclass(frozen=True, slots=True)
class StepTiming:
    """The time (s) of one step at one hop.

    queue_seconds, compute_seconds: measured by the server. total_seconds: their sum, and a share of
    the rest of the time that the client measured, which is divided equally among the hops that
    forwarded the step to each other. batch_tokens: tokens in the batch that the step ran in.
    """

    step_id: int
    num_tokens: int
    total_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class HopTrace:
    """The latest steps of one hop, and whether the client's stream to it goes through a relay."""

    peer_id: PeerId
    blocks: BlockSpan
    steps: tuple[StepTiming, ...]
    is_relayed: bool = False

    def median_seconds(self, part: str = "total") -> float:
        """Median (s) over the steps of ``part``: "total", "queue" or "compute"; 0 without steps."""
        return median_of([getattr(step, f"{part}_seconds") for step in self.steps])

    @property
    def overhead_seconds(self) -> float:
        """Median (s) of total - queue - compute: the time for links, framing and scheduling."""
        return median_of(
            [s.total_seconds - s.queue_seconds - s.compute_seconds for s in self.steps]
        )


class Way(StrEnum):
    """The path of hidden states from one server to the next."""

    DIRECT = "direct"
    RELAYED = "relayed"
    VIA_CLIENT = "via the client"


@dataclass(frozen=True, slots=True)
class EdgeTrace:
    """Two consecutive hops and the present path from ``near`` to ``far``."""

    near: PeerId
    far: PeerId
    way: Way


@dataclass(frozen=True, slots=True)
class Repair:
    """A hop that was lost, and the route that replaced it.

    stall_seconds: time (s) in which the session made no progress. rounding: empty if the
    replacement computes as the lost hop did; otherwise how both do (precision, processor, threads):
    equality of the tokens that follow is then promised up to rounding only.
    """

    peer_id: PeerId
    blocks: BlockSpan
    reason: str
    replaced_by: Route
    stall_seconds: float
    rounding: str = ""


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """A snapshot of a session: its route and the latest of its steps (about a thousand).

    step_seconds: time (s) of each step through the whole route.
    """

    hops: tuple[HopTrace, ...]
    step_seconds: tuple[float, ...]
    edges: tuple[EdgeTrace, ...] = ()
    repairs: tuple[Repair, ...] = ()

    def __str__(self) -> str:
        """The route, with the path between two servers where it is not direct."""
        arrows = [" → " if edge.way is Way.DIRECT else f" → ({edge.way}) → " for edge in self.edges]
        hops = [
            f"{hop.blocks} at …{hop.peer_id[-6:]} ({hop.median_seconds() * 1e3:.1f} ms)"
            for hop in self.hops
        ]
        pairs = zip_longest(hops, arrows[: len(hops)], fillvalue="")
        return "".join(part for pair in pairs for part in pair)


def median_of(values: Sequence[float]) -> float:
    """The median; 0 if there are no values."""
    return median(values) if values else 0.0
