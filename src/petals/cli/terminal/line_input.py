"""Reading what a user types in a chat: from a terminal with editing and history, or from a pipe.

Must not know models and conversations.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from petals.cli.terminal.wording import utf8

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

PROMPT = "> "
_CONTINUATION = "  "


class LineSource(Protocol):
    """``read`` returns the next line without surrounding line ends, None at the end of input.

    It raises BadInput for text that is not UTF-8, and KeyboardInterrupt for Ctrl-C.
    """

    is_terminal: bool

    def read(self) -> str | None: ...


class PipeLines:
    """Lines of a pipe or file. Bytes are read: the locale has no say in what they mean."""

    is_terminal = False

    def read(self) -> str | None:
        line = sys.stdin.buffer.readline()
        return utf8(line, "The line").strip("\r\n") if line else None


class TerminalLines:
    """Lines of a terminal, edited with the usual keys and of any length.

    The terminal's own line editing cuts a line after 4,095 bytes. A paste of several lines is one
    question. ``history`` is a file for the lines typed, readable by its owner only.
    """

    is_terminal = True

    def __init__(self, history: Path, completions: Sequence[str] = ()) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            history=_open_history(history),
            completer=_completer(completions),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            key_bindings=_keys(),
            prompt_continuation=_CONTINUATION,
            # stdout may be redirected: the prompt belongs where the user looks.
            output=create_output(always_prefer_tty=True),
        )

    def read(self) -> str | None:
        try:
            return utf8(self._session.prompt(PROMPT), "The line")
        except EOFError:
            return None


def open_lines(history: Path, completions: Sequence[str] = ()) -> LineSource:
    """Lines of the terminal, if standard input is one."""
    return TerminalLines(history, completions) if sys.stdin.isatty() else PipeLines()


def _open_history(file: Path) -> "History":
    """The history in ``file``; in memory if that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def _completer(words: Sequence[str]) -> "Completer":
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter(list(words), sentence=True)


def _keys() -> "KeyBindings":
    """Alt-Enter starts a new line; Enter ends the question."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
