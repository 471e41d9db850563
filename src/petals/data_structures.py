"""The original's words for what servers announce: uids of blocks, and the servers of a block.

Made from the records of the directory. Knows no network and no sessions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from petals.errors import ConfigError
from petals.swarm.directory.records import ServerRecord, View
from petals.types import PeerId, ServerState

__all__ = ["ServerState"]

ModuleUID = str
"""``"prefix.3"``: block 3 of the model that is called ``prefix`` in the swarm."""

UID_DELIMITER = "."
"""Between the prefix and the number of a block."""

CHAIN_DELIMITER = " "
"""Between the uids of several blocks."""


def parse_uid(uid: ModuleUID) -> tuple[str, int]:
    """``"prefix.3"`` -> ``("prefix", 3)``. Raises ConfigError for anything else."""
    prefix, _, number = uid.rpartition(UID_DELIMITER)
    if not prefix or not number.isdigit():
        raise ConfigError(f"{uid!r} is not the uid of a block.", hint='["prefix.0", "prefix.1"]')
    return prefix, int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server announces. Rates are in blocks x tokens/s."""

    state: ServerState
    throughput: float
    start_block: int
    end_block: int
    public_name: str | None = None
    version: str | None = None
    inference_rps: float | None = None
    adapters: Sequence[str] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None

    @classmethod
    def of(cls, record: ServerRecord) -> "ServerInfo":
        """The record's content; of several spans, their hull."""
        return cls(
            state=record.state,
            throughput=record.throughput,
            start_block=min(start for start, _ in record.spans),
            end_block=max(end for _, end in record.spans),
            public_name=record.public_name,
            version=record.version,
            inference_rps=record.inference_rps,
            adapters=record.adapters,
            torch_dtype=record.dtype,
            quant_type=record.quant or "none",
            using_relay=record.relayed,
        )


@dataclass(slots=True)
class RemoteModuleInfo:
    """One block and the servers that hold it."""

    uid: ModuleUID
    servers: dict[PeerId, ServerInfo] = field(default_factory=dict)


@dataclass(slots=True)
class RemoteSpanInfo:
    """Blocks [start, end) at one server, counted from the first block of the sequence."""

    peer_id: PeerId
    start: int
    end: int
    server_info: ServerInfo

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def state(self) -> ServerState:
        return self.server_info.state

    @property
    def throughput(self) -> float:
        return self.server_info.throughput


def modules_of(view: View, uids: Sequence[ModuleUID]) -> list[RemoteModuleInfo]:
    """The servers of each block, in any state."""
    infos = {peer: ServerInfo.of(record) for peer, record in view.records.items()}
    return [
        RemoteModuleInfo(
            uid,
            {
                peer: infos[peer]
                for peer, record in view.records.items()
                if record.holds(parse_uid(uid)[1])
            },
        )
        for uid in uids
    ]


_BY_READINESS = (
    ServerState.OFFLINE,
    ServerState.JOINING,
    ServerState.DRAINING,
    ServerState.ONLINE,
)


def compute_spans(
    module_infos: Sequence[RemoteModuleInfo], *, min_state: ServerState
) -> dict[PeerId, RemoteSpanInfo]:
    """The blocks that each server holds among those of ``module_infos``, which follow each other.

    min_state: least state of a server that counts, in the order offline, joining, draining, online.
    """
    states = _BY_READINESS[_BY_READINESS.index(min_state) :]
    spans: dict[PeerId, RemoteSpanInfo] = {}
    for index, module in enumerate(module_infos):
        for peer, info in module.servers.items():
            if info.state in states:
                span = spans.setdefault(peer, RemoteSpanInfo(peer, index, index + 1, info))
                span.end = index + 1
    return spans
