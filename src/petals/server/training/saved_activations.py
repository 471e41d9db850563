"""Passes whose way back is expected: found by who made them, dropped when it does not come.

Belongs to the compute thread. Knows no streams and no blocks' insides.
"""

from dataclasses import dataclass

from petals.clock import Clock
from petals.errors import BadInput, PassExpired
from petals.server.training.chunked_pass import SavedActivations
from petals.types import PeerId
from petals.wire.fields import WireBlocks
from petals.wire.passes import Forward

PassKey = tuple[PeerId, bytes | None, WireBlocks]


@dataclass(frozen=True, slots=True)
class _SavedPass:
    request: Forward
    trail: SavedActivations
    expires_at: float


class KeptPasses:
    """Trails by peer, pass and blocks; each serves once, within its lease."""

    def __init__(self, lease_seconds: float, clock: Clock) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._kept: dict[PassKey, _SavedPass] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, peer: PeerId, request: Forward, trail: SavedActivations) -> None:
        """Until ``take``, or until the lease is over. The same request may come again."""
        self.drop(peer, request)
        expires_at = self._clock.monotonic() + self._lease_seconds
        self._kept[_key(peer, request)] = _SavedPass(request, trail, expires_at)

    def find(self, peer: PeerId, request: Forward) -> SavedActivations:
        """What was kept of ``request``. Raises PassExpired; BadInput for another request."""
        self.expire()
        kept = self._kept.get(_key(peer, request))
        if kept is None:
            raise PassExpired("What this pass needs on its way back is not kept here (any more).")
        if kept.request != request:
            raise BadInput(
                "The way back of another pass was asked for under this id.",
                hint="Repeat the request of the Forward as it was.",
            )
        return kept.trail

    def release(self, peer: PeerId, request: Forward) -> None:
        """A trail is used now and belongs to its user."""
        self._kept.pop(_key(peer, request), None)

    def drop(self, peer: PeerId, request: Forward) -> None:
        """Let a trail go, if there is one."""
        kept = self._kept.pop(_key(peer, request), None)
        if kept is not None:
            kept.trail.drop()

    def expire(self) -> None:
        """Drop what nobody came back for."""
        now = self._clock.monotonic()
        for key, kept in list(self._kept.items()):
            if kept.expires_at <= now:
                del self._kept[key]
                kept.trail.drop()


def _key(peer: PeerId, request: Forward) -> PassKey:
    return peer, request.pass_id, request.blocks
