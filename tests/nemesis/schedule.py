"""What goes wrong, when: a schedule of faults that a seed determines.

Every scene can be played alone: it follows from the seed and its own number, not from the scenes
before it. Pure; knows no processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Phase(StrEnum):
    """What clients are doing when it happens."""

    PREFILL = "prefill"
    DECODE = "decode"
    ROLLBACK = "rollback"
    BEAMS = "beams"
    BATCH = "batch"
    CROWD = "crowd"
    TRAINING = "training"


class Fault(StrEnum):
    """What happens. A hop is one of the servers of the session under way."""

    KILL = "SIGKILL"
    PAUSE = "SIGSTOP"
    HANG = "SIGSTOP of python alone"
    DRAIN = "SIGTERM"
    LEAVE = "SIGTERM twice"
    JOIN = "join"
    BOOTSTRAP = "bootstrap SIGKILL"
    SERVER_DAEMON = "server p2pd SIGKILL"
    CLIENT_DAEMON = "client p2pd SIGKILL"
    CUT = "cut"
    ONE_WAY_CUT = "one-way cut"
    CUT_LINK = "cut between two hops"
    SLOW = "slow link"
    LOSS = "5 % loss"


ON_NETWORK = frozenset({Fault.CUT, Fault.ONE_WAY_CUT, Fault.CUT_LINK, Fault.SLOW, Fault.LOSS})
"""Faults of links, which need a network laboratory."""

ON_PROCESSES = tuple(fault for fault in Fault if fault not in ON_NETWORK)
PAIRABLE = (Fault.KILL, Fault.PAUSE, Fault.SERVER_DAEMON, Fault.CLIENT_DAEMON)
ON_SERVERS = PAIRABLE[:-1]
TWO_AT_ONCE = "two at once"

_LATEST = 0.6
"""Share of a phase's steps after which nothing happens any more: the rest shows the repair."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault. ``at``: share of the phase's steps done before it. ``delay``: share of a step
    that then still passes, so that the fault meets a step under way; 0: between two steps.
    ``lasts``: steps after which a fault that ends by itself is over.
    """

    fault: Fault
    hop: int
    at: float
    delay: float = 0.0
    lasts: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Scene:
    """One run: a model, a phase, what happens in it. Everything that repeats it is here."""

    seed: int
    number: int
    model: str
    phase: Phase
    strikes: tuple[Strike, ...]

    @property
    def label(self) -> str:
        """How tables call its fault."""
        return TWO_AT_ONCE if len(self.strikes) > 1 else str(self.strikes[0].fault)

    def __str__(self) -> str:
        strikes = "; ".join(
            f"{s.fault} at hop {s.hop}, {s.at:.2f} of the steps + {s.delay:.2f} step"
            for s in self.strikes
        )
        return f"seed {self.seed} scene {self.number}: {self.model}, {self.phase}: {strikes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What scenes are drawn from: models with their weights in the draw, hops, faults."""

    models: Sequence[tuple[str, int]]
    num_hops: int
    faults: Sequence[Fault]
    phases: Sequence[Phase] = tuple(Phase)


def draw(stage: Stage, seed: int, number: int) -> Scene:
    """Scene ``number`` of a seed: all pairs of fault and phase come before any comes again."""
    labels = [*stage.faults, TWO_AT_ONCE]
    pairs = [(label, phase) for label in labels for phase in stage.phases]
    Random(f"{seed}/round {number // len(pairs)}").shuffle(pairs)
    label, phase = pairs[number % len(pairs)]
    random = Random(f"{seed}/{number}")
    models = [name for name, weight in stage.models for _ in range(weight)]
    if label == TWO_AT_ONCE:
        faults = [random.choice(PAIRABLE), random.choice(ON_SERVERS)]
    else:
        faults = [Fault(label)]
    first, at = random.randrange(stage.num_hops), random.uniform(0.1, _LATEST)
    strikes = tuple(
        Strike(
            fault=fault,
            hop=(first + offset) % stage.num_hops,
            at=at,
            delay=random.choice((0.0, random.uniform(0.0, 1.0))),
            lasts=random.choice((4, 1_000_000)),
        )
        for offset, fault in enumerate(faults)
    )
    return Scene(seed, number, random.choice(models), phase, strikes)
