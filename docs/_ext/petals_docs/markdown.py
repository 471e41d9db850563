"""Small pieces of Markdown: tables, docstrings, links. Knows nothing of Petals."""

import inspect
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a cell's line breaks become spaces, its bars are escaped. Columns without
    any content are left out.
    """
    rows = list(rows)
    filled = [index for index in range(len(head)) if any(row[index].strip() for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "| " + " | ".join(_cell(line[index]) for index in filled) + " |" for line in lines
        )
        + "\n"
    )


def code(text: str) -> str:
    """``text`` as inline code; empty stays empty."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""


def docstring(owner: object) -> str:
    """The docstring of a module, class or function as Markdown; empty if it has none of its own."""
    text = owner.__doc__ if isinstance(owner, type) else inspect.getdoc(owner)
    return as_markdown(inspect.cleandoc(text)) if text else ""


def as_markdown(text: str) -> str:
    """The plain reStructuredText that docstrings use, as Markdown: literal blocks become fences."""
    text = re.sub(r"^::\n(?=\n[ ]+)", "", text, flags=re.MULTILINE)
    text = re.sub(r"::\n(?=\n[ ]+)", ":\n", text)
    blocks = re.compile(r"(?:^[ ]{4,}.*\n?(?:^[ ]*\n)*)+", re.MULTILINE)
    return blocks.sub(_fenced, text)


def sentence(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.partition("\n\n")[0].split())


def _fenced(block: re.Match[str]) -> str:
    return f"```text\n{inspect.cleandoc(block.group()).rstrip()}\n```\n\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
