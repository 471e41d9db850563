"""Values that every layer shares: ids, spans, routes, states.

Must not know torch, network and clock.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from petals.errors import ConfigError

PeerId = NewType("PeerId", str)
"""Base58 libp2p peer id; it is derived from the peer's public key."""

SessionId = NewType("SessionId", bytes)
"""16 random bytes chosen by the client; unique together with the client's peer id."""

ModelId = NewType("ModelId", str)
"""Name of a model in the directory (the original's ``dht_prefix``): equal for all servers of the
same weights.
"""

SESSION_ID_BYTES = 16

_SPAN = re.compile(r"^(\d+):(\d+)$")


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
    """Consecutive blocks ``[start, end)`` of one model, counted from its first decoder layer."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ConfigError(
                f"Blocks {self.start}:{self.end} are not a span.",
                hint="Write START:END with 0 <= START < END, for example 0:10.",
            )

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def covers(self, other: "BlockSpan") -> bool:
        """True if every block of ``other`` is one of ours."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: "BlockSpan") -> bool:
        """True if at least one block is in both spans."""
        return max(self.start, other.start) < min(self.end, other.end)

    @classmethod
    def parse(cls, text: str) -> "BlockSpan":
        """``"0:10"`` -> ``BlockSpan(0, 10)``. Raises ConfigError for anything else."""
        match = _SPAN.match(text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(
                f"{text!r} is not a span of blocks.",
                hint="Write START:END with 0 <= START < END, for example 0:10.",
            )
        return cls(int(match[1]), int(match[2]))


class ServerState(StrEnum):
    """State of a server in its record."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class Hop:
    """One server and the blocks it runs for a session."""

    peer_id: PeerId
    blocks: BlockSpan


Route = tuple[Hop, ...]
"""Hops in order; their blocks follow each other without gap or overlap."""
