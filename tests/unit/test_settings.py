"""Config classes: one check for all of them, and what is generated from their fields."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from petals.client.config import ClientConfig
from petals.errors import ConfigError
from petals.server.config import ServerConfig
from petals.settings import (
    PositiveFloat,
    PositiveInt,
    Setting,
    Settings,
    WholeNumber,
    build,
    fields_of,
)
from petals.swarm.config import NodeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Oven(Settings):
    heat: Annotated[PositiveFloat, Setting("Heat in kelvin.", "--heat", "KELVIN")] = 450.0
    mode: Annotated[Literal["fan", "grill"], Setting("How to heat.")] = "fan"
    racks: Annotated[PositiveInt | None, Setting("Racks.", "--racks", "N")] = None
    log: Annotated[Path | None, Setting("Log file.", "--log", "FILE")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kitchen(Settings):
    owner: Annotated[str, Setting("Owner.", "OWNER")]
    tables: Annotated[WholeNumber, Setting("Tables.")] = 1
    oven: Annotated[Oven, Setting("Oven")] = Oven()

    def check(self) -> None:
        if self.tables > 3 and self.oven.racks is None:
            raise ConfigError("Many tables need racks.")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heat": 0}, "heat=0 is not allowed: expected a number > 0.0."),
        ({"heat": float("nan")}, "heat=nan is not allowed: expected a number > 0.0."),
        ({"heat": "hot"}, "heat='hot' is not allowed: expected a number, got a text."),
        ({"mode": "sun"}, "mode='sun' is not allowed: choose one of fan, grill."),
        ({"racks": 0}, "racks=0 is not allowed: expected an integer >= 1."),
        ({"racks": 1.5}, "racks=1.5 is not allowed: expected an integer, got a number."),
        ({"log": 3}, "log=3 is not allowed: expected Path, got int."),
    ],
)
def test_a_wrong_value_is_named(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Oven(**fields)
    assert caught.value.message == sentence
    assert next(iter(fields)) in caught.value.hint


def test_a_hint_names_the_option_and_its_meaning() -> None:
    with pytest.raises(ConfigError) as caught:
        Oven(heat=-1)
    assert caught.value.hint == "heat (--heat): Heat in kelvin."


def test_values_get_the_type_of_their_field() -> None:
    oven = Oven(heat=300, log="~/oven.log")
    assert isinstance(oven.heat, float)
    assert oven.log == Path.home() / "oven.log"


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(Oven(), heat=0)


def test_a_field_without_a_meaning_is_a_mistake() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Bare(Settings):
        heat: float = 1.0

    with pytest.raises(TypeError, match=r"Bare\.heat needs"):
        Bare()


def test_fields_may_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="need racks"):
        Kitchen(owner="me", tables=4)


def test_a_config_is_built_from_values_by_path() -> None:
    kitchen = build(Kitchen, {"owner": "me", "tables": 4, "oven.racks": 2})
    assert kitchen == Kitchen(owner="me", tables=4, oven=Oven(racks=2))


def test_fields_come_in_order_with_their_path_and_headings() -> None:
    found = list(fields_of(Kitchen))
    assert [field.path for field in found] == [
        *("owner", "tables", "oven.heat", "oven.mode", "oven.racks", "oven.log")
    ]
    assert found[0].default is dataclasses.MISSING
    assert found[2].headings == ("Oven",)
    assert found[3].choices == ("fan", "grill")


@pytest.mark.parametrize("kind", [ClientConfig, NodeConfig, ServerConfig])
def test_every_field_is_documented_and_every_option_is_unique(kind: type[Settings]) -> None:
    found = list(fields_of(kind))
    assert all(field.setting.help.strip().endswith(".") for field in found)
    flags = [
        flag for field in found for flag in field.setting.flag.split("/") if field.setting.flag
    ]
    assert len(flags) == len(set(flags))
