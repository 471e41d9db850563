"""What happens to a simulated swarm, and who is in it."""

from dataclasses import dataclass, field

from petals.server.lifecycle.rebalancing import MoverState
from petals.server.policies import MovePolicy
from petals.swarm.directory.records import BLOCKS_PER_BUCKET, KEPT_SECONDS, shard_bits_for
from petals.types import BlockSpan, PeerId

HOUR = 3600.0
MODEL = "example/a-model-of-some-size"
REGION_SHARES = (0.27, 0.14, 0.05, 0.26, 0.08, 0.15, 0.05)
REGION_MS = (  # NA east and west, SA, EU west and east, Asia east, Oceania: typical backbones
    (12, 62, 115, 78, 105, 165, 200),
    (62, 12, 170, 135, 160, 110, 140),
    (115, 170, 15, 185, 210, 270, 300),
    (78, 135, 185, 12, 35, 220, 260),
    (105, 160, 210, 35, 15, 190, 280),
    (165, 110, 270, 220, 190, 30, 120),
    (200, 140, 300, 260, 280, 120, 15),
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens to the swarm. Rates are per server and hour, times in seconds.

    A server that goes tells nobody in ``sudden_share`` of the cases; its record then stays until
    it expires. ``shock_at``: the hour at which ``shock_share`` of those that hold a block of the
    second quarter of the model die at once.
    """

    num_servers: int
    hours: float
    num_blocks: int = 80
    churn_per_hour: float = 0.1
    sudden_share: float = 0.5
    load_seconds: float = 240.0
    small_expiry_seconds: float = 60.0
    lag_seconds: float = 30.0
    settle_seconds: float = 45.0
    warm_up_hours: float = 2.0
    shock_at: float | None = None
    shock_share: float = 0.6
    seed: int = 0
    policy: MovePolicy | None = field(default_factory=MovePolicy)
    num_route_samples: int = 20
    search_rounds: int = 1000
    """Of the search for the best placement, every other hour."""

    holders_worth: float = 4.0
    """Small swarms get servers large enough that every block has so many holders on average."""

    @property
    def expiry_seconds(self) -> float:
        """How long records live: longer where the directory has many shards."""
        in_bucket = self.num_servers * 2 * BLOCKS_PER_BUCKET / self.num_blocks
        return KEPT_SECONDS if shard_bits_for(round(in_bucket)) else self.small_expiry_seconds


@dataclass(slots=True)
class Server:
    """One server as it really is. ``throughput`` in block passes per second."""

    peer_id: PeerId
    capacity: int
    throughput: float
    region: int
    last_mile: float
    blocks: BlockSpan = BlockSpan(0, 0)
    is_serving: bool = False
    is_alive: bool = True
    state: MoverState | None = None
