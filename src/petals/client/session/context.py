"""What the parts of one session share, and which of its hops forward to each other now."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from petals.client.config import ClientConfig
from petals.client.routing.latency import StepTimeouts
from petals.client.routing.swarm_state import SwarmState
from petals.client.session.hop import HopSession
from petals.client.session.replies import Replies
from petals.client.session.state import SessionState
from petals.client.session.types import SessionSpec
from petals.client.trace import EdgeTrace, Way
from petals.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class SessionContext:
    """One session's state, the swarm it runs in, and what it waits for."""

    state: SessionState
    swarm: SwarmState
    spec: SessionSpec
    replies: Replies
    timeouts: StepTimeouts

    @property
    def config(self) -> ClientConfig:
        return self.swarm.config

    @property
    def now(self) -> float:
        """Time (s, monotonic)."""
        return self.swarm.node.clock.monotonic()

    def segment_end(self, hops: Sequence[HopSession], start: int = 0) -> int:
        """The first hop after ``start`` that its predecessor does not forward to."""
        if not self.config.use_server_to_server:
            return start + 1
        return self.swarm.edges.run_end([hop.peer_id for hop in hops], start, self.now)

    def close_links(self, hops: Sequence[HopSession]) -> None:
        """For some time, states go through the client between each two of these hops."""
        for near, far in pairwise(hops):
            logger.debug("…%s to …%s goes through the client", near.peer_id[-6:], far.peer_id[-6:])
            self.swarm.edges.close(near.peer_id, far.peer_id, self.now)

    def edges(self) -> tuple[EdgeTrace, ...]:
        """How states get from hop to hop now."""
        pairs = pairwise(self.state.legs)
        return tuple(EdgeTrace(a.peer_id, b.peer_id, self._way(a, b)) for a, b in pairs)

    def _way(self, near: HopSession, far: HopSession) -> Way:
        if self.segment_end([near, far]) == 1:
            return Way.VIA_CLIENT
        is_relayed = self.swarm.edges.is_relayed(near.peer_id, far.peer_id)
        return Way.RELAYED if is_relayed else Way.DIRECT
