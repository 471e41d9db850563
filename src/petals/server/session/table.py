"""All sessions of a server: found by who opened them, freed when nobody speaks for them any more.

Knows no streams, no steps and no blocks' insides.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from petals.errors import PeerBusy
from petals.server.session.session import Session, SessionKey
from petals.types import PeerId


class SessionTable:
    """All sessions of a server."""

    def __init__(self, lease_seconds: float, max_per_peer: int) -> None:
        self._lease_seconds = lease_seconds
        self._max_per_peer = max_per_peer
        self._sessions: dict[SessionKey, Session] = {}
        self._expected: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __getitem__(self, key: SessionKey) -> Session:
        return self._sessions[key]

    def get(self, key: SessionKey) -> Session | None:
        return self._sessions.get(key)

    def find(self, peer_id: PeerId, session_id: bytes) -> list[Session]:
        """A peer's sessions of one id (several only if it uses our span in several parts)."""
        return [
            s
            for k, s in self._sessions.items()
            if (k.peer_id, k.session_id) == (peer_id, session_id)
        ]

    @contextmanager
    def reserve_slot(self, peer_id: PeerId) -> Iterator[None]:
        """Hold a place while a session is being opened.

        Raises PeerBusy if the peer has its share.
        """
        held = sum(key.peer_id == peer_id for key in self._sessions) + self._expected[peer_id]
        if held >= self._max_per_peer:
            raise PeerBusy(
                f"This server lets one client keep {self._max_per_peer} sessions open.",
                hint="Close some, or use another server.",
            )
        self._expected[peer_id] += 1
        try:
            yield
        finally:
            self._expected[peer_id] -= 1
            if not self._expected[peer_id]:
                del self._expected[peer_id]

    def add(self, session: Session) -> None:
        self._sessions[session.key] = session

    async def end(self, session: Session) -> None:
        """Close a session and free its memory. Idempotent."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            await session.close()
            session.held.close()

    def silent(self) -> list[Session]:
        """Sessions whose client has not been heard for longer than the lease."""
        return [s for s in self._sessions.values() if s.silent_seconds > self._lease_seconds]
