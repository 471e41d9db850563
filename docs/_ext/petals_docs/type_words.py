"""Types and their bounds in few words: ``int 0..1024``, ``bytes of length 16``, ``str | None``."""

import types
from typing import Any, Literal, Union, get_args, get_origin

import msgspec


def type_words(kind: Any) -> str:
    """What a reader needs of an annotation, msgspec's bounds included."""
    if hasattr(kind, "__metadata__"):
        return type_words(kind.__origin__) + "".join(map(_bounds, kind.__metadata__))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_words, arguments))
    if origin is not None:
        inner = ", ".join("…" if each is Ellipsis else type_words(each) for each in arguments)
        return f"{origin.__name__}[{inner}]"
    return "None" if kind is type(None) else kind.__name__


def _bounds(meta: Any) -> str:
    """The bounds in one ``msgspec.Meta``; nothing for other annotations."""
    if not isinstance(meta, msgspec.Meta):
        return ""
    if meta.max_length is not None:
        exact = meta.min_length == meta.max_length
        return f" of length {meta.max_length}" if exact else f" of length <= {meta.max_length}"
    if meta.gt is not None:
        return f" > {_number(meta.gt)}"
    if meta.le is None:
        return f" >= {_number(meta.ge)}" if meta.ge is not None else ""
    return f" {_number(meta.ge)}..{_number(meta.le)}"


def _number(value: float | None) -> str:
    """Large powers of two as powers, other numbers as they are."""
    if value is None:
        return ""
    for exact, words in ((value, "2^{}"), (value + 1, "2^{}-1")):
        if isinstance(exact, int) and exact > 2**20 and exact & (exact - 1) == 0:
            return words.format(exact.bit_length() - 1)
    return f"{value:g}" if isinstance(value, float) else str(value)
