"""The turns of a chat and the commands that begin with a slash.

Pure but for /save, which writes a file. Must not know models and terminals.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from petals.cli.terminal.chat_template import ChatMessage
from petals.logs import plural

HELP = """\
/help           show this (also /?)
/clear          forget the conversation, and keep the system prompt (also /new)
/retry          ask the last question again
/system [TEXT]  show the system prompt, or set it from now on; /system - removes it
/save FILE      write the conversation to FILE as JSON
/quit           leave (also Ctrl-D)
Ctrl-C ends an answer. Alt-Enter starts a new line; pasted lines stay together.
A question that begins with a slash: type a blank in front of it."""

_COMMAND = re.compile(r"/(\w+|\?)(?:\s+(.*))?", re.DOTALL)
"""A path such as /etc/hosts is no command, and neither is a line that begins with a blank."""


@dataclass(slots=True)
class ChatTurns:
    """What the model is shown. Unanswered questions are never part of it."""

    system: str = ""
    _turns: list[ChatMessage] = field(default_factory=list)
    _last_question: str = ""
    _is_answered: bool = False

    def messages(self, question: str) -> list[ChatMessage]:
        """All that the model has to read to answer ``question``."""
        self._last_question, self._is_answered = question, False
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self._turns, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Keep a question with its answer, or with the part of it that was shown."""
        self._turns.append({"role": "user", "content": question})
        self._turns.append({"role": "assistant", "content": answer})
        self._is_answered = True

    def clear(self) -> None:
        self._turns.clear()
        self._is_answered = False

    def take_back(self) -> str:
        """The last question, answered or not; its answer is forgotten. Empty if there was none."""
        if self._is_answered:
            del self._turns[-2:]
            self._is_answered = False
        return self._last_question

    def save(self, file: Path) -> int:
        """Write the turns as JSON, as chat templates take them. Returns their number.

        Raises FileExistsError, and OSError if the file cannot be written.
        """
        opening = [{"role": "system", "content": self.system}] if self.system else []
        turns = [*opening, *self._turns]
        with file.open("x", encoding="utf-8") as out:
            json.dump(turns, out, ensure_ascii=False, indent=2)
            out.write("\n")
        return len(turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineEffect:
    """What follows from a line: ``question`` is asked, ``leaves`` ends the chat, ``refused`` says
    that the line was not understood. ``words`` are shown.
    """

    words: str = ""
    question: str = ""
    leaves: bool = False
    refused: bool = False


def react(line: str, conversation: ChatTurns) -> LineEffect:
    """Carry out a command on the conversation; any other line is a question."""
    command = _COMMAND.fullmatch(line)
    if command is None:
        return LineEffect(question=line.strip())
    name, rest = command[1], (command[2] or "").strip()
    if name in ("quit", "exit", "bye"):
        return LineEffect(leaves=True)
    known = _COMMANDS.get(name)
    if known is None:
        return LineEffect(words=f"There is no command /{name}; /help lists them.", refused=True)
    return known(conversation, rest)


def _help(conversation: ChatTurns, rest: str) -> LineEffect:
    return LineEffect(words=HELP)


def _clear(conversation: ChatTurns, rest: str) -> LineEffect:
    conversation.clear()
    return LineEffect(words="The conversation is forgotten.")


def _retry(conversation: ChatTurns, rest: str) -> LineEffect:
    question = conversation.take_back()
    if not question:
        return LineEffect(words="There is no question to ask again.", refused=True)
    return LineEffect(question=question)


def _system(conversation: ChatTurns, rest: str) -> LineEffect:
    if not rest:
        return LineEffect(words=conversation.system or "There is no system prompt.")
    conversation.system = "" if rest == "-" else rest
    return LineEffect(
        words="The system prompt is set." if conversation.system else "It is removed."
    )


def _save(conversation: ChatTurns, rest: str) -> LineEffect:
    if not rest:
        return LineEffect(words="Name a file: /save FILE", refused=True)
    file = Path(rest).expanduser()
    try:
        saved = conversation.save(file)
    except FileExistsError:
        return LineEffect(words=f"{file} exists already; name another file.", refused=True)
    except OSError as error:
        return LineEffect(words=f"{file} cannot be written: {error.strerror}.", refused=True)
    return LineEffect(words=f"{plural(saved, 'message')} written to {file}.")


_COMMANDS: dict[str, Callable[[ChatTurns, str], LineEffect]] = {
    "help": _help,
    "?": _help,
    "clear": _clear,
    "new": _clear,
    "retry": _retry,
    "system": _system,
    "save": _save,
}

COMMAND_NAMES = tuple(f"/{name}" for name in ("help", "clear", "retry", "system", "save", "quit"))
"""What a terminal completes after a slash."""
