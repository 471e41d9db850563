"""The base of every config class: frozen, documented field by field, checked when it is made.

A config class is a frozen dataclass derived from ``Settings``. Each field carries its type with its
bounds (msgspec's ``Meta``) and a ``Setting`` with its help text and, where it has one, its option
on the command line. Commands and the reference are generated from these. Must not know which
configs exist, the command line or the environment.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from petals.errors import ConfigError

PositiveInt = Annotated[int, Meta(ge=1)]
WholeNumber = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]

S = TypeVar("S", bound="Settings")

_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "True or False",
    "array": "a list",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field means, for people, and how a command takes it.

    ``help``: one or two sentences, with the unit; for a field that is itself a Settings class, the
    heading of its options. ``flag``: "--threads", "--relay/--no-relay", or "MODEL" for a positional
    argument; empty for a field that has no option. ``metavar`` names the option's value and its
    unit. ``scale``: the option's value times this is the field's (2**20 for a value in MiB).
    ``env``: the environment variable that stands in for the option. ``parse`` turns what users
    write, on the command line or in Python, into the field's value; it raises ConfigError.
    """

    help: str
    flag: str = ""
    metavar: str = ""
    scale: int = 1
    env: str = ""
    parse: Callable[[Any], object] | None = None


@dataclass(frozen=True, slots=True)
class SettingField:
    """One field that holds a value: ``path`` leads to it from the outermost config class.

    ``type`` is the annotation without ``Setting``, bounds included. ``default`` is what a config
    made now would hold, ``dataclasses.MISSING`` if the field is required. ``headings`` are the help
    texts of the fields that lead to it.
    """

    path: str
    type: Any
    default: object
    setting: Setting
    headings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a field of ``Literal`` type may hold; empty for other types."""
        literals = [_literals(part) for part in alternatives(self.type)]
        return tuple(word for words in literals for word in words) if all(literals) else ()

    def accept(self, value: object) -> object:
        """``value`` in the field's own type. Raises ConfigError if it is not allowed."""
        if self.setting.parse is not None:
            value = self.setting.parse(value)
        try:
            return msgspec.convert(value, self.type, dec_hook=_convert_path)
        except msgspec.ValidationError as error:
            raise self._refused(value, str(error)) from None

    def _refused(self, value: object, reason: str) -> ConfigError:
        if self.choices:
            reason = f"choose one of {', '.join(self.choices)}"
        reason = re.sub(r"`([^`]*)`", _type_words, reason)
        reason = re.sub(r" matching regex .*", " of another form", reason)
        option = self.setting.flag.partition("/")[0]
        called = f"{self.name} ({option})" if option.startswith("--") else self.name
        return ConfigError(
            f"{self.name}={value!r} is not allowed: {reason[0].lower()}{reason[1:]}.",
            hint=f"{called}: {self.setting.help}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Base of config classes. Making one checks every field and then ``check``.

    Raises ConfigError, with a sentence and a hint that name the field.
    """

    def __post_init__(self) -> None:
        for name, kind, setting in _annotations(type(self)):
            value = getattr(self, name)
            if isinstance(value, Settings):
                continue
            field = SettingField(name, kind, None, setting)
            object.__setattr__(self, name, field.accept(value))
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the fields, each sound by itself, contradict each other."""


def fields_of(kind: type[Settings]) -> Iterator[SettingField]:
    """Every field of ``kind`` that holds a value, those of nested config classes in their place."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(kind)}
    for name, annotation, setting in _annotations(kind):
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            for field in fields_of(annotation):
                yield dataclasses.replace(
                    field, path=f"{name}.{field.path}", headings=(setting.help, *field.headings)
                )
        else:
            yield SettingField(name, annotation, defaults[name], setting)


def build(kind: type[S], values: Mapping[str, object]) -> S:
    """A config from values by path, such as ``{"compute.dtype": "float32"}``; the rest are
    defaults. Raises ConfigError.
    """
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    kinds = {name: annotation for name, annotation, _ in _annotations(kind)}
    for name, inner in nested.items():
        own[name] = build(kinds[name], inner)
    return kind(**own)


_Annotations = tuple[tuple[str, Any, Setting], ...]
_annotations_by_class: dict[type, _Annotations] = {}


def _annotations(kind: type[Settings]) -> _Annotations:
    """(name, type with its bounds, setting) of each field; read once per class."""
    if kind not in _annotations_by_class:
        _annotations_by_class[kind] = _read_annotations(kind)
    return _annotations_by_class[kind]


def _read_annotations(kind: type[Settings]) -> _Annotations:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        annotation, *extras = get_args(hints[field.name]) or (hints[field.name],)
        settings = [extra for extra in extras if isinstance(extra, Setting)]
        if len(settings) != 1:
            raise TypeError(f"{kind.__name__}.{field.name} needs Annotated[..., Setting(...)].")
        metas = [extra for extra in extras if isinstance(extra, Meta)]
        for meta in metas:
            annotation = Annotated[annotation, meta]
        found.append((field.name, annotation, settings[0]))
    return tuple(found)


def _default(field: "dataclasses.Field[Any]") -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, None left out; the type itself if it is none."""
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from alternatives(member)
    elif annotation is not NoneType:
        yield annotation


def _type_words(match: re.Match[str]) -> str:
    """msgspec's name of a type, such as ``int | null``, in words; None need not be named."""
    names = [name for name in match[1].split(" | ") if name != "null"]
    return " or ".join(_TYPE_WORDS.get(name, name) for name in names)


def _literals(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _convert_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
