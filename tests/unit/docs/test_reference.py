"""The generated reference pages: nothing of the code is missing, and their cells are right."""

import dataclasses
import re
from typing import Annotated, Literal, get_args

import pytest
import typer
from msgspec import Meta

from petals.cli.main import app
from petals.client.load_options import REFUSED, WITHOUT_EFFECT
from petals.errors import ERRORS_BY_CODE
from petals.wire.messages import AnyMessage
from petals_docs import commands, environment, errors, loading, messages, services, settings
from petals_docs.markdown import as_markdown, code, table
from petals_docs.type_words import type_words


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `+(.+?)`+ \|", text, re.MULTILINE)


def test_every_error_once() -> None:
    assert sorted(first_cells(errors.render())) == sorted(set(ERRORS_BY_CODE) - {"error"})


def test_an_error_says_when_what_to_do_and_whether_again() -> None:
    (row,) = [line for line in errors.render().splitlines() if line.startswith("| `cache_full`")]
    _, _, name, meaning, hint, _ = row.split("|")
    assert name.strip() == "`CacheFull`"
    assert meaning.strip().endswith("Retryable.")
    assert "max_length" in hint


def test_every_command_with_every_option() -> None:
    text = commands.render()
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        children = getattr(command, "commands", {"": command})
        for child_name, child in children.items():
            heading = f"## petals {name} {child_name}".rstrip() + "\n"
            assert heading in text
            section = text.partition(heading)[2].partition("\n## ")[0]
            for option in child.params:
                assert all(f"{each}" in section for each in option.opts if each[0] == "-")


def test_every_field_of_every_config() -> None:
    text = settings.render()
    for kind in settings.config_classes():
        section = text.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
        assert first_cells(section) == [field.name for field in dataclasses.fields(kind)]


def test_configs_are_found_from_those_that_users_make() -> None:
    names = [kind.__name__ for kind in settings.config_classes()]
    assert names[0] == "ClientConfig"
    assert {"ServerConfig", "NodeConfig", "ComputeConfig", "MovePolicy"} <= set(names)
    assert len(set(names)) == len(names)


def test_every_environment_variable() -> None:
    assert first_cells(environment.render()) == [
        "PETALS_CACHE",
        "PETALS_INITIAL_PEERS",
        "PETALS_SWARM_KEY",
        "PETALS_MAX_RETRIES",
        "PETALS_LOGGING",
    ]


def test_every_argument_that_is_not_honoured() -> None:
    assert first_cells(loading.render()) == sorted([*REFUSED, *WITHOUT_EFFECT])


def test_every_message_with_its_fields() -> None:
    text = messages.render()
    for kind in get_args(AnyMessage):
        section = text.partition(f"### {kind.__name__}\n")[2].partition("\n### ")[0]
        section = section.partition("\n## ")[0]
        assert first_cells(section) == list(kind.__struct_fields__)


def test_every_service() -> None:
    assert first_cells(services.render()) == ["blocks", "ring", "node"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "int"),
        (str | None, "str | None"),
        (Literal["a", "b"], "'a' | 'b'"),
        (tuple[int, ...], "tuple[int, …]"),
        (Annotated[int, Meta(ge=0, le=2**31 - 1)], "int 0..2^31-1"),
        (Annotated[int, Meta(ge=0, le=2**53)], "int 0..2^53"),
        (Annotated[int, Meta(ge=1)], "int >= 1"),
        (Annotated[float, Meta(gt=0)], "float > 0"),
        (Annotated[bytes, Meta(min_length=16, max_length=16)], "bytes of length 16"),
        (Annotated[str, Meta(max_length=256)], "str of length <= 256"),
        (Annotated[int, "a note"], "int"),
    ],
)
def test_types_in_words(kind: object, words: str) -> None:
    assert type_words(kind) == words


def test_tables_escape_what_would_end_a_cell() -> None:
    assert (
        table(("a", "b"), [("1 | 2", "two\nlines")]).splitlines()[-1] == "| 1 \\| 2 | two lines |"
    )
    assert table(("a", "b", "c"), [("1", " ", "3")]).splitlines()[0] == "| a | c |"
    assert code("a`b") == "``a`b``"
    assert code("") == ""


def test_literal_blocks_become_fences() -> None:
    text = as_markdown("Frames::\n\n    +--+\n    |  |\n\nAfter.")
    assert text == "Frames:\n\n```text\n+--+\n|  |\n```\n\nAfter."
