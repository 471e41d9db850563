"""Which faults come when: a schedule that a seed determines.

Every scenario can be run alone: it follows from the seed and its own number, not from the scenarios
before it. Pure; knows no processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random


class Phase(StrEnum):
    """What the clients do when the fault comes."""

    PREFILL = "prefill"
    DECODE = "decode"
    ROLLBACK = "rollback"
    BEAMS = "beams"
    BATCH = "batch"
    CROWD = "crowd"
    TRAINING = "training"


class FaultKind(StrEnum):
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
    SERVER_SLEEP = "server sleeps"
    CLIENT_SLEEP = "client sleeps"
    BOOTSTRAP_SLEEP = "bootstrap sleeps"
    LAPTOP_SLEEP = "all of them sleep"
    RESTARTS = "five restarts"
    RESTARTS_WITH_IDENTITY = "five restarts with an identity"
    OTHER_HARDWARE = "successor on other hardware"
    ADDRESS = "server's address changes"


ON_NETWORK = frozenset(
    {FaultKind.CUT, FaultKind.ONE_WAY_CUT, FaultKind.CUT_LINK, FaultKind.SLOW, FaultKind.LOSS}
)
"""Faults of links, which need a network laboratory."""

LAPTOP_LIFE = (
    FaultKind.SERVER_SLEEP,
    FaultKind.CLIENT_SLEEP,
    FaultKind.BOOTSTRAP_SLEEP,
    FaultKind.LAPTOP_SLEEP,
    FaultKind.RESTARTS,
    FaultKind.RESTARTS_WITH_IDENTITY,
    FaultKind.OTHER_HARDWARE,
    FaultKind.ADDRESS,
)
"""What happens to machines that people carry about. Each takes up to two minutes.
Only root can change an address.
"""

STOPS_ALL = frozenset(
    {
        FaultKind.CLIENT_SLEEP,
        FaultKind.LAPTOP_SLEEP,
        FaultKind.OTHER_HARDWARE,
        FaultKind.ADDRESS,
    }
)
"""Faults during which no replica can continue."""

ON_PROCESSES_AND_NETWORK = tuple(kind for kind in FaultKind if kind not in LAPTOP_LIFE)
ON_PROCESSES = tuple(kind for kind in ON_PROCESSES_AND_NETWORK if kind not in ON_NETWORK)
PAIRABLE = (FaultKind.KILL, FaultKind.PAUSE, FaultKind.SERVER_DAEMON, FaultKind.CLIENT_DAEMON)
ON_SERVERS = PAIRABLE[:-1]
TWO_AT_ONCE = "two at once"

_LATEST = 0.6
"""Share of a phase's steps after which no fault begins: the remaining steps show the repair."""

_FOR_EVER = 1_000_000


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``at``: share of the phase's steps done before it. ``delay``: share of a step
    that then still passes, so that the fault meets a step under way; 0: between two steps.
    ``lasts``: number of steps after which a fault that ends by itself is over.
    """

    kind: FaultKind
    hop: int
    at: float
    delay: float = 0.0
    lasts: int = _FOR_EVER


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run: a model, a phase and the faults in it. Holds everything that repeats the run."""

    seed: int
    number: int
    model: str
    phase: Phase
    faults: tuple[Fault, ...]

    @property
    def label(self) -> str:
        """The name of its fault in tables."""
        return TWO_AT_ONCE if len(self.faults) > 1 else str(self.faults[0].kind)

    def __str__(self) -> str:
        faults = "; ".join(
            f"{fault.kind} at hop {fault.hop}, {fault.at:.2f} of the steps + {fault.delay:.2f} step"
            for fault in self.faults
        )
        return f"seed {self.seed} scenario {self.number}: {self.model}, {self.phase}: {faults}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioSpace:
    """What scenarios are drawn from: a model's number of hops, fault kinds, phases."""

    model: str
    num_hops: int
    kinds: Sequence[FaultKind]
    phases: Sequence[Phase] = tuple(Phase)


def draw(space: ScenarioSpace, seed: int, number: int) -> Scenario:
    """Scenario ``number`` of a seed: all pairs of fault and phase come before any comes again."""
    labels = [*space.kinds, TWO_AT_ONCE]
    pairs = [(label, phase) for label in labels for phase in space.phases]
    Random(f"{seed}/round {number // len(pairs)}").shuffle(pairs)
    label, phase = pairs[number % len(pairs)]
    random = Random(f"{seed}/{number}")
    if label == TWO_AT_ONCE:
        kinds = [random.choice(PAIRABLE), random.choice(ON_SERVERS)]
    else:
        kinds = [FaultKind(label)]
    first, at = random.randrange(space.num_hops), random.uniform(0.1, _LATEST)
    faults = tuple(
        Fault(
            kind=kind,
            hop=(first + offset) % space.num_hops,
            at=at,
            delay=random.choice((0.0, random.uniform(0.0, 1.0))),
            lasts=random.choice((4, _FOR_EVER)),
        )
        for offset, kind in enumerate(kinds)
    )
    return Scenario(seed, number, space.model, phase, faults)
