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
    │   ├── AdapterRefused          an adapter that does not fit these blocks, or is too large
    │   ├── TrainingRefused         a server that gives no gradients, with the reason
    │   └── NotSupported            a mode this version does not offer
    └── SessionError
        ├── CacheFull               no free KV memory now; may be asked again
        ├── SessionClosed           used after close or after its lease ended
        ├── SessionGap              a step does not follow the one before
        ├── PassExpired             what a backward pass needs is no longer kept
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
    default_hint: ClassVar[str] = "Please report it with the whole message: this should not happen."

    reported: bool = False
    """True for an error that a peer has reported: ``message`` is the peer's claim, not ours."""

    reported_hint: str = ""
    """The hint of that peer, shown as the peer's words."""

    generated: object | None = None
    """What `generate` had produced when it raised this: token ids [rows, columns] in the shape of
    its result, or None. `generate` sets it on errors of other types, too (KeyboardInterrupt)."""

    def __init__(self, message: str, *, hint: str = "", peer_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint
        self.peer_id = peer_id

    def __str__(self) -> str:
        text = self.message
        if self.reported:
            text = f"Peer …{self.peer_id[-6:]} says: {text}"
            text += f" ({self.reported_hint})" if self.reported_hint else ""
        elif self.peer_id:
            text += f" (peer …{self.peer_id[-6:]})"
        return f"{text}\nhint: {self.hint}" if self.hint else text


class ConfigError(PetalsError, ValueError):
    """An option, an address, a key file or a config field is not allowed."""

    code = "config"
    default_hint = "Each command lists its options with --help."


class ModelNotFound(ConfigError):
    """There is no such folder or repository, or the hub cannot be reached."""

    code = "model_not_found"
    default_hint = "Name a repository as OWNER/NAME, or give the path of a local folder."


class ModelNotSupported(ConfigError):
    """The architecture cannot be split, or needs code of its own; the message says why."""

    code = "model_not_supported"
    default_hint = "petals models check lists the architectures that work."


class PickleCheckpointRefused(ConfigError):
    """The weights are pickled (``.bin``, ``.pt``); unpickling can run code from the file."""

    code = "pickle_refused"
    default_hint = "petals models convert MODEL TARGET turns it into safetensors, safely."


class ModelFilesBroken(ConfigError):
    """A weight file, an index, a config or the tokenizer is missing or damaged."""

    code = "model_files_broken"
    default_hint = "Download the model again."


class NotEnoughDisk(ConfigError):
    """There is no room for a download or a conversion; no partial file is left."""

    code = "not_enough_disk"
    default_hint = "Free some space, or use a larger disk."


class SwarmError(PetalsError):
    """The swarm as a whole cannot do it: a local swarm did not start or has ended, or a client was
    shut down while a call waited.
    """

    code = "swarm"
    default_hint = "petals status --join ADDR shows whether the swarm is alive."


class BootstrapFailed(SwarmError):
    """None of the initial peers answered within ``connect_timeout``."""

    code = "bootstrap_failed"
    default_hint = "Check the address, that the peer runs, and that its port is open."


class ClockWrong(SwarmError):
    """The clock of this machine differs so much from those of the swarm's members that records in
    the directory would count as expired, here or there.
    """

    code = "clock_wrong"
    default_hint = (
        "Set the clock, for example by NTP; `date -u` shows what this machine takes for the time."
    )


class AdmissionDenied(SwarmError):
    """The swarm is closed and the key is wrong or missing, or the clocks differ by more than the
    10 minutes for which a ticket is valid.
    """

    code = "admission_denied"
    default_hint = "Use the key file of this swarm: --swarm-key FILE."


class RecordInvalid(SwarmError):
    """A record of the directory is forged, expired or malformed; it is ignored and logged."""

    code = "record_invalid"
    default_hint = "Update Petals on the peer that announced it; others ignore the entry."


class RouteError(PetalsError):
    """No server can serve the session after the time that the client waits, or the inputs for a
    repair did not fit into ``max_kept_bytes``.
    """

    code = "route"
    default_hint = "petals status --join ADDR shows who serves what."


class MissingBlocksError(RouteError):
    """No server holds the blocks that the message names."""

    code = "missing_blocks"
    default_hint = "Start a server for them: petals serve MODEL --blocks A:B --join ADDR."


class NoCapacity(RouteError):
    """Servers hold the blocks, and all of them refused this request."""

    code = "no_capacity"
    default_hint = "Wait until other sessions end, ask for less, or start another server."


class PeerError(PetalsError):
    """One peer failed; another one may do better."""

    code = "peer"
    retryable = True
    default_hint = "Try again: another server is used if there is one."


class PeerUnreachable(PeerError):
    """No connection to the peer could be made, or it was lost."""

    code = "peer_unreachable"
    default_hint = "petals status --join ADDR shows who is online; is a firewall in the way?"


class PeerTimeout(PeerError):
    """No answer, or no sign of life, within the time limit."""

    code = "peer_timeout"
    default_hint = "Try again: the server may be overloaded, or its connection slow."


class PeerBusy(PeerError):
    """The peer has too many sessions, streams or bytes of this client or in all, or is draining."""

    code = "peer_busy"
    default_hint = "Wait a little, or use another server."


class PeerFailed(PeerError):
    """The peer met an error of its own (a bug, memory) while it served the request; only that
    request failed.
    """

    code = "peer_failed"
    default_hint = "The server's own log says why; try again, another server may do better."


class ProtocolError(PeerError):
    """Bytes that are not this protocol, or that exceed a bound; the stream is closed."""

    code = "protocol"
    default_hint = "Update Petals on both sides; something else may answer on that port."


class VersionMismatch(PeerError):
    """The peer speaks another version of the protocol, or none (Petals 2)."""

    code = "version_mismatch"
    default_hint = "Update Petals on both sides."


class PeerMisbehaved(PeerError):
    """A well-formed answer that cannot be right: a wrong shape or dtype, or NaN."""

    code = "peer_misbehaved"
    default_hint = "The server is avoided from now on; tell whoever runs the swarm."


class RequestError(PetalsError, ValueError):
    """The request itself is not possible. Repeating it gives the same answer. A session is still
    usable after a step that was refused, and stands where it stood.
    """

    code = "request"
    default_hint = "Change the request; repeating it gives the same answer."


class BadInput(RequestError):
    """An empty prompt, a token id outside the vocabulary, states or gradients of a wrong shape or
    dtype (integers are refused, not rounded), NaN or infinity.
    """

    code = "bad_input"
    default_hint = "Token ids are [batch, tokens], hidden states finite floats [.., hidden_size]."


class LengthExceeded(RequestError):
    """More tokens than the session was opened for, or than its servers allow."""

    code = "length_exceeded"
    default_hint = "Open the session with a larger max_length, or send less."


class BatchTooLarge(RequestError):
    """More rows, or tokens in one step or pass, than a server allows."""

    code = "batch_too_large"
    default_hint = "Split the batch."


class RequestTooLarge(RequestError):
    """The request would not fit even into an empty server, so waiting cannot help."""

    code = "request_too_large"
    default_hint = "Ask for a smaller max_length or batch."


class UnknownAdapter(RequestError):
    """No server of these blocks has the adapter that ``active_adapter`` names."""

    code = "unknown_adapter"
    default_hint = "Leave active_adapter out, or use a server that has the adapter."


class AdapterRefused(RequestError):
    """An adapter that is not a LoRA in safetensors, whose names or shapes do not fit the blocks,
    that holds NaN, or that is larger than a server allows.
    """

    code = "adapter_refused"
    default_hint = "Adapters are LoRA in peft's safetensors format, made for this very model."


class TrainingRefused(RequestError):
    """The server gives no gradients: its operator forbids them, its int8 kernels have none, or
    those that it has differ from the model's own.
    """

    code = "training_refused"
    default_hint = "Train through other servers; this one can still be read from."


class UnknownModel(RequestError):
    """The server runs another model."""

    code = "unknown_model"
    default_hint = "petals status --join ADDR shows the names of the models served."


class BlocksNotServed(RequestError):
    """The server does not hold these blocks any more; the client reads the directory again."""

    code = "blocks_not_served"
    retryable = True
    default_hint = "Look at the directory again; the server may have moved."


class NotSupported(RequestError, NotImplementedError):
    """A mode that this version does not offer; the hint names the alternative, if there is one."""

    code = "not_supported"
    default_hint = "The documentation says what this version offers."


class SessionError(PetalsError):
    """The session cannot continue as asked."""

    code = "session"
    default_hint = "Open a new session."


class CacheFull(SessionError):
    """No server had KV memory for the session within ``alloc_timeout``."""

    code = "cache_full"
    retryable = True
    default_hint = "Wait (alloc_timeout), ask for a smaller max_length, or use another server."


class SessionClosed(SessionError):
    """The session was used after ``close``, after its server left, or after a silence longer than
    the lease.
    """

    code = "session_closed"
    default_hint = "Open a new session."


class SessionGap(SessionError):
    """A step begins behind the end of its row, or a position was never reached."""

    code = "session_gap"
    default_hint = "Go on where the row ends, or before; the session is still usable."


class PassExpired(SessionError):
    """A backward pass came after the server had dropped the activations of its forward pass. The
    client sends the inputs again by itself.
    """

    code = "pass_expired"
    default_hint = "The client mends this by itself: it sends the inputs again."


class OutboxLost(SessionError):
    """The server has dropped the session's outputs to make room, and cannot refill another server
    with them. The client uses its own inputs instead, by itself.
    """

    code = "outbox_lost"
    default_hint = "The client mends this by itself, with its own inputs."


def _tree(root: type[PetalsError]) -> dict[str, type[PetalsError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ERRORS_BY_CODE: dict[str, type[PetalsError]] = _tree(PetalsError)
"""Wire code -> class, for errors that arrive from a peer."""


def from_wire(code: str, message: str, hint: str, peer_id: str) -> PetalsError:
    """The typed error a peer reported; an unknown code (a newer peer) becomes PeerFailed.

    Message and hint of the peer are shown as the peer's words. The error's own hint is the one that
    this version gives for such an error.
    """
    error = ERRORS_BY_CODE.get(code, PeerFailed)(_printable(message), peer_id=peer_id)
    error.reported, error.reported_hint = True, _printable(hint)
    return error


def _printable(text: str) -> str:
    """A peer's words end up on a terminal, which obeys control characters."""
    return "".join(char if char.isprintable() else " " for char in text)
