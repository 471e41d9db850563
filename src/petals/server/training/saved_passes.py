"""The forward passes of all clients that wait for their backward; a lease limits how long.

Only the compute thread uses it. Knows no streams, and of activations only how to drop them.
"""

from dataclasses import dataclass

from petals.clock import Clock
from petals.errors import BadInput, PassExpired
from petals.server.training.saved_activations import SavedActivations
from petals.types import PeerId
from petals.wire.fields import WireBlocks
from petals.wire.passes import Forward

PassKey = tuple[PeerId, bytes | None, WireBlocks]


@dataclass(frozen=True, slots=True)
class _SavedPass:
    request: Forward
    activations: SavedActivations
    expires_at: float


class SavedPasses:
    """Saved activations by peer, pass id and blocks; each serves one backward."""

    def __init__(self, lease_seconds: float, clock: Clock) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._saved: dict[PassKey, _SavedPass] = {}

    def __len__(self) -> int:
        return len(self._saved)

    def slot(self, peer: PeerId, request: Forward) -> "PassSlot":
        """The slot of one client's pass."""
        return PassSlot(self, peer, request)

    def expire(self) -> None:
        """Drop what has outlived its lease."""
        now = self._clock.monotonic()
        for key, saved in list(self._saved.items()):
            if saved.expires_at <= now:
                del self._saved[key]
                saved.activations.drop()


@dataclass(frozen=True, slots=True)
class PassSlot:
    """Where one client's pass is kept between its forward and its backward."""

    passes: SavedPasses
    peer: PeerId
    request: Forward

    @property
    def key(self) -> PassKey:
        return self.peer, self.request.pass_id, self.request.blocks

    def keep(self, activations: SavedActivations) -> None:
        """Hold them until ``release``, ``drop`` or the end of the lease. A forward that is repeated
        replaces what the first one has saved.
        """
        self.drop()
        passes = self.passes
        expires_at = passes._clock.monotonic() + passes.lease_seconds
        passes._saved[self.key] = _SavedPass(self.request, activations, expires_at)

    def find(self) -> SavedActivations:
        """What is saved. Raises PassExpired, or BadInput if it is of another request."""
        self.passes.expire()
        saved = self.passes._saved.get(self.key)
        if saved is None:
            raise PassExpired("The activations of this pass are not kept here (any more).")
        if saved.request != self.request:
            raise BadInput(
                "A backward of another forward was asked for under this pass id.",
                hint="Repeat the request of the Forward as it was.",
            )
        return saved.activations

    def release(self) -> None:
        """Forget what is saved: from now on it belongs to the caller of ``find``."""
        self.passes._saved.pop(self.key, None)

    def drop(self) -> None:
        """Drop what is saved, if anything is."""
        saved = self.passes._saved.pop(self.key, None)
        if saved is not None:
            saved.activations.drop()
