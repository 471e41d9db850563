"""The reference of config fields, from the config classes themselves."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from petals.client.config import ClientConfig
from petals.client.tuning.prompts import TuningConfig
from petals.models.adapters.config import LoraConfig
from petals.server.config import ServerConfig
from petals.settings import Setting, Settings
from petals_docs.markdown import code, docstring, table
from petals_docs.type_words import type_words

ROOTS: tuple[type, ...] = (ClientConfig, TuningConfig, LoraConfig, ServerConfig)
"""What users make; the classes of their fields are found from them."""


def render() -> str:
    """One section for each class, one row for each field."""
    return "\n".join(_section(kind) for kind in config_classes())


def config_classes() -> list[type]:
    """The roots, each followed by the config classes among its fields."""
    found: dict[type, None] = {}
    for root in ROOTS:
        found.update(dict.fromkeys(_walk(root)))
    return list(found)


def _walk(kind: type) -> Iterator[type]:
    yield kind
    for hint in get_type_hints(kind).values():
        if isinstance(hint, type) and issubclass(hint, Settings):
            yield from _walk(hint)


def _section(kind: type) -> str:
    hints = get_type_hints(kind, include_extras=True)
    rows = [_row(field, hints[field.name]) for field in dataclasses.fields(kind)]
    head = ("field", "type", "default", "meaning, option")
    where = f"In {code(kind.__module__)}."
    return "\n\n".join((f"## {kind.__name__}", docstring(kind), where, table(head, rows)))


def _row(field: "dataclasses.Field[Any]", hint: Any) -> tuple[str, ...]:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    setting = next((extra for extra in extras if isinstance(extra, Setting)), Setting(""))
    meaning = f"{setting.help} {code(setting.flag)}"
    return code(field.name), code(type_words(hint)), _default(field), meaning


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return code(f"{type(value).__name__}()")
    return code(f"{value:,}".replace(",", "_") if type(value) is int else repr(value))
