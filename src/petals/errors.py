"""Every error Petals raises on purpose, with its code on the wire.

::

    PetalsError
    ├── ConfigError                 what the user typed makes no sense
    │   ├── ModelNotFound           no such repository or folder
    │   ├── ModelNotSupported       the architecture cannot be split, with the reason
    │   ├── PickleCheckpointRefused only .bin/.pt weights; the hint converts them
    │   ├── ModelFilesBroken        an index or a tensor is missing or damaged
    │   └── NotEnoughDisk           no room for a download or a conversion
    ├── SwarmError                  the swarm as a whole cannot do it
    │   ├── BootstrapFailed         none of the given peers answers
    │   ├── AdmissionDenied         wrong or missing swarm key
    │   └── RecordInvalid           a directory entry is forged, expired or malformed
    ├── RouteError
    │   ├── MissingBlocksError      nobody serves some blocks
    │   └── NoCapacity              servers hold the blocks but have no room
    ├── PeerError                   one peer failed; another may do better
    │   ├── PeerUnreachable · PeerTimeout · PeerBusy · PeerFailed
    │   ├── ProtocolError           bytes that are not our protocol
    │   ├── VersionMismatch         a peer of another protocol version
    │   └── PeerMisbehaved          a well-formed answer that cannot be right
    ├── RequestError                the client asked for something impossible: never retried
    │   ├── BadInput                shape, dtype, NaN, token id, empty prompt
    │   ├── LengthExceeded · BatchTooLarge · RequestTooLarge
    │   ├── UnknownAdapter · UnknownModel · BlocksNotServed
    │   └── NotSupported            a mode this version does not offer
    └── SessionError
        ├── CacheFull               no free KV memory now; may be asked again
        ├── SessionClosed           used after close or after its lease ended
        ├── SessionGap              a step does not follow the one before
        └── OutboxLost              a server no longer has the outputs it is to replay

``retryable`` says whether the same request may succeed at another peer or later. Errors a client
caused are never retryable and never ban a server. ``hint`` says what to type or check next. Knows
no torch and no network.
"""

from typing import ClassVar


class PetalsError(Exception):
    """Root of the tree. ``str(error)`` is one sentence; ``error.hint`` is what to do about it."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", peer_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.peer_id = peer_id

    def __str__(self) -> str:
        text = self.message
        if self.peer_id:
            text += f" (peer …{self.peer_id[-6:]})"
        return f"{text}\nhint: {self.hint}" if self.hint else text


class ConfigError(PetalsError, ValueError):
    code = "config"


class ModelNotFound(ConfigError):
    code = "model_not_found"


class ModelNotSupported(ConfigError):
    code = "model_not_supported"


class PickleCheckpointRefused(ConfigError):
    code = "pickle_refused"


class ModelFilesBroken(ConfigError):
    code = "model_files_broken"


class NotEnoughDisk(ConfigError):
    code = "not_enough_disk"


class SwarmError(PetalsError):
    code = "swarm"


class BootstrapFailed(SwarmError):
    code = "bootstrap_failed"


class AdmissionDenied(SwarmError):
    code = "admission_denied"


class RecordInvalid(SwarmError):
    code = "record_invalid"


class RouteError(PetalsError):
    """Nobody can serve, after all the waiting. ``generated`` is what `generate` has made so far:
    token ids [rows, columns] in the shape of its answer, or None.
    """

    code = "route"
    generated: object | None = None


class MissingBlocksError(RouteError):
    code = "missing_blocks"


class NoCapacity(RouteError):
    code = "no_capacity"


class PeerError(PetalsError):
    code = "peer"
    retryable = True


class PeerUnreachable(PeerError):
    code = "peer_unreachable"


class PeerTimeout(PeerError):
    code = "peer_timeout"


class PeerBusy(PeerError):
    code = "peer_busy"


class PeerFailed(PeerError):
    """The peer met an error of its own (a bug, memory) while serving the request."""

    code = "peer_failed"


class ProtocolError(PeerError):
    code = "protocol"


class VersionMismatch(PeerError):
    code = "version_mismatch"


class PeerMisbehaved(PeerError):
    code = "peer_misbehaved"


class RequestError(PetalsError, ValueError):
    code = "request"


class BadInput(RequestError):
    code = "bad_input"


class LengthExceeded(RequestError):
    code = "length_exceeded"


class BatchTooLarge(RequestError):
    code = "batch_too_large"


class RequestTooLarge(RequestError):
    """A request that can never fit this server, however long one waits."""

    code = "request_too_large"


class UnknownAdapter(RequestError):
    code = "unknown_adapter"


class UnknownModel(RequestError):
    code = "unknown_model"


class BlocksNotServed(RequestError):
    """The server does not hold the blocks it was asked for (its record was read before it
    moved).
    """

    code = "blocks_not_served"
    retryable = True


class NotSupported(RequestError, NotImplementedError):
    code = "not_supported"


class SessionError(PetalsError):
    code = "session"


class CacheFull(SessionError):
    code = "cache_full"
    retryable = True


class SessionClosed(SessionError):
    code = "session_closed"


class SessionGap(SessionError):
    code = "session_gap"


class OutboxLost(SessionError):
    """The server has dropped the session's outputs to make room; its rows themselves stand."""

    code = "outbox_lost"


def _tree(root: type[PetalsError]) -> dict[str, type[PetalsError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ERRORS_BY_CODE: dict[str, type[PetalsError]] = _tree(PetalsError)
"""Wire code -> class, for errors that arrive from a peer."""


def from_wire(code: str, message: str, hint: str, peer_id: str) -> PetalsError:
    """The typed error a peer reported; an unknown code (a newer peer) becomes PeerFailed."""
    return ERRORS_BY_CODE.get(code, PeerFailed)(message, hint=hint, peer_id=peer_id)
