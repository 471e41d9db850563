"""What happened in a simulation, line by line, for the reader of a failed test.

Lines are kept as values and are written out only if somebody reads them.
"""

from dataclasses import dataclass

import msgspec

from petals.wire.fields import Message
from petals.wire.header import RequestHeader
from petals.wire.requests import Forwarded

_NOT_SHOWN = ("header", "hint", "timings", "queue_seconds", "compute_seconds", "batch_tokens")


@dataclass(frozen=True, slots=True)
class Sent:
    """A message on its way. number: it grows with every message of a simulation."""

    number: int
    at_seconds: float
    source: str
    target: str
    stream: int
    message: Message


class Story:
    """The lines of one simulation."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str, str] | Sent] = []
        self._sessions: dict[bytes, str] = {}

    def note(self, at_seconds: float, who: str, what: str) -> None:
        self._lines.append((at_seconds, who, what))

    def note_sent(self, sent: Sent) -> None:
        self._lines.append(sent)

    def told(self, num_lines: int | None = None) -> str:
        """The last lines of the story (None: all of them)."""
        lines = [self._line(line) for line in self._lines]
        return "\n".join(lines[-num_lines:] if num_lines else lines)

    def _line(self, line: tuple[float, str, str] | Sent) -> str:
        if isinstance(line, tuple):
            at_seconds, who, what = line
            return f"{at_seconds:9.3f}        {who:>12}  {what}"
        way = f"{line.source}>{line.target}/{line.stream}"
        return f"{line.at_seconds:9.3f} {line.number:5d}  {way:>12}  {self._summary(line.message)}"

    def _summary(self, message: Message) -> str:
        if isinstance(message, Forwarded):
            return f"Forwarded {self._summary(message.message)}"
        header = getattr(message, "header", None)
        parts = [type(message).__name__]
        if isinstance(header, RequestHeader):
            parts.append(f"{self._name(header)} epoch {header.epoch} id {header.request_id}")
        for field in msgspec.structs.fields(message):
            value = getattr(message, field.name)
            if value not in (None, (), False, 0, "") and field.name not in _NOT_SHOWN:
                parts.append(f"{field.name} {value}")
        return " ".join(parts)

    def _name(self, header: RequestHeader) -> str:
        """Sessions are numbered in the order of their first appearance."""
        return self._sessions.setdefault(header.session_id, f"s{len(self._sessions) + 1}")
