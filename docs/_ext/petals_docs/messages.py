"""The reference of the wire protocol, from the docstrings and fields of the messages."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec

import petals.wire
from petals.wire import frames, messages
from petals.wire.fields import Message
from petals.wire.messages import AnyMessage
from petals_docs.markdown import code, docstring, table
from petals_docs.type_words import type_words


def render() -> str:
    """The frames, then the messages of each module of ``petals.wire``."""
    for module in pkgutil.iter_modules(petals.wire.__path__, "petals.wire."):
        importlib.import_module(module.name)
    parts = [f"Version of the protocol: {frames.PROTOCOL_VERSION}.\n", _frames(), _overview()]
    parts += [_module(name, kinds) for name, kinds in _by_module().items()]
    return "\n".join(parts)


def _frames() -> str:
    limits = [
        ("largest payload of a MESSAGE frame", f"{frames.MAX_HEADER_BYTES:,} bytes"),
        ("largest payload of a CHUNK frame", f"{frames.MAX_CHUNK_BYTES:,} bytes"),
    ]
    kinds = [(code(kind.name), str(kind.value)) for kind in frames.FrameKind]
    return "\n".join(
        (
            "## Frames\n",
            docstring(frames),
            "",
            table(("kind", "number"), kinds),
            table(("bound", "value"), limits),
        )
    )


def _overview() -> str:
    return f"## Messages\n\n{docstring(messages)}\n"


def _by_module() -> dict[str, list[type[Message]]]:
    """Modules in the order in which the protocol lists their messages; parts of messages with the
    messages of their module, in the order of its text.
    """
    found: dict[str, list[type[Message]]] = {kind.__module__: [] for kind in get_args(AnyMessage)}
    for kind in _subclasses(Message):
        found.setdefault(kind.__module__, []).append(kind)
    return found


def _subclasses(kind: type[Message]) -> Iterator[type[Message]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _module(name: str, kinds: list[type[Message]]) -> str:
    module = sys.modules[name]
    intro = "" if name == "petals.wire.messages" else docstring(module) + "\n"
    return "\n".join((f"## {name}\n", intro, *map(_message, kinds)))


def _message(kind: type[Message]) -> str:
    hints = get_type_hints(kind, include_extras=True)
    rows = [
        (code(field.name), code(type_words(hints[field.name])), _default(field))
        for field in msgspec.structs.fields(kind)
    ]
    fields = table(("field", "type", "default"), rows) if rows else "No fields.\n"
    return f"### {kind.__name__}\n\n{docstring(kind)}\n\n{fields}"


def _default(field: Any) -> str:
    if field.default is msgspec.NODEFAULT:
        return "required"
    return code(repr(field.default))
