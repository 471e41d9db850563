"""Who may take part: the swarm key and the tickets made with it.

A ticket of kind 1 proves that its holder knows the swarm key, to one verifier, until it expires::

    kind (u8 = 1) | expires_at (u64, seconds) | mac (32 bytes)
    mac = HMAC-SHA256(key, label, holder, verifier, expires_at, bound bytes)

Both peer ids are proven by the engine's encryption, so a ticket is of no use to a third peer. A
ticket cannot be revoked; change the key for that. Without a key (an open swarm) tickets are empty
and every peer is admitted. Pure. Must not know clock, sockets and messages.
"""

import base64
import binascii
import hashlib
import hmac
import os
import struct
from dataclasses import dataclass, field

from petals.errors import AdmissionDenied, ConfigError
from petals.types import PeerId

TICKET_SECONDS = 600.0
"""How long (s) a ticket is valid; long, because the clocks of volunteers' machines differ."""

_KIND = 1
_HEAD = struct.Struct("!BQ")
_MAC_BYTES = 32
_LABEL = b"petals ticket 1"
_FILE_HEAD = "petals-swarm-key-1:"
_HINT_OPEN = (
    "If the swarm is open, leave the key out (--swarm-key, PETALS_SWARM_KEY); otherwise the "
    "address is one of another swarm."
)
_HINT_KEY = "Start with --swarm-key FILE, the same key file as the rest of the swarm."


@dataclass(frozen=True, slots=True)
class SwarmKey:
    """32 secret bytes that all members of a closed swarm share."""

    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "SwarmKey":
        return cls(os.urandom(32))

    @classmethod
    def parse(cls, text: str) -> "SwarmKey":
        """The content of a key file (or of an environment variable). Raises ConfigError for
        anything else.
        """
        head, _, body = text.strip().partition(":")
        try:
            secret = base64.b64decode(body, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            secret = b""
        if f"{head}:" != _FILE_HEAD or len(secret) != 32:
            raise ConfigError("This is not a swarm key.", hint=_HINT_KEY)
        return cls(secret)

    def format(self) -> str:
        """The content of a key file: one line of text."""
        return f"{_FILE_HEAD}{base64.urlsafe_b64encode(self.secret).decode()}\n"


@dataclass(frozen=True, slots=True)
class Admission:
    """Issues this peer's tickets and checks those of others. ``key`` None is an open swarm."""

    peer_id: PeerId
    key: SwarmKey | None = None

    @property
    def is_open(self) -> bool:
        return self.key is None

    def issue(self, verifier: PeerId, now: float, bound: bytes = b"") -> bytes:
        """This peer's ticket for ``verifier``, issued at ``now`` (seconds since the epoch); it also
        proves ``bound``, the bytes that it is sent with.
        """
        if self.key is None:
            return b""
        expires_at = int(now + TICKET_SECONDS)
        mac = _mac(self.key, self.peer_id, verifier, expires_at, bound)
        return _HEAD.pack(_KIND, expires_at) + mac

    def check(self, ticket: bytes, holder: PeerId, now: float, bound: bytes = b"") -> None:
        """Return if ``holder`` may take part. Raises AdmissionDenied with the reason."""
        if self.key is None:
            return
        if not ticket:
            raise AdmissionDenied("This swarm is private: a swarm key is required.", hint=_HINT_KEY)
        if len(ticket) != _HEAD.size + _MAC_BYTES or ticket[0] != _KIND:
            raise AdmissionDenied("The ticket is of a kind we do not know.", hint=_HINT_KEY)
        _, expires_at = _HEAD.unpack_from(ticket)
        expected = _mac(self.key, holder, self.peer_id, expires_at, bound)
        if not hmac.compare_digest(ticket[_HEAD.size :], expected):
            raise AdmissionDenied("The swarm key is not the one of this swarm.", hint=_HINT_KEY)
        if not now - TICKET_SECONDS <= expires_at <= now + 2 * TICKET_SECONDS:
            raise AdmissionDenied(
                "The ticket has expired.",
                hint="Set the clocks of both machines by NTP; they differ.",
            )

    def check_welcome(self, ticket: bytes, holder: PeerId, now: float) -> None:
        """Return if ``holder``, which has admitted this peer, is of the same swarm.

        Raises AdmissionDenied. A peer of an open swarm admits everyone and has no ticket to show.
        """
        if self.key is not None and not ticket:
            raise AdmissionDenied(
                "A swarm key was given, and the peer that was asked has none.", hint=_HINT_OPEN
            )
        self.check(ticket, holder, now)


def _mac(key: SwarmKey, holder: PeerId, verifier: PeerId, expires_at: int, bound: bytes) -> bytes:
    mac = hmac.new(key.secret, digestmod=hashlib.sha256)
    for part in (_LABEL, holder.encode(), verifier.encode(), struct.pack("!Q", expires_at), bound):
        mac.update(struct.pack("!I", len(part)))
        mac.update(part)
    return mac.digest()
