"""`petals chat` as people use it: keys, pastes, Ctrl-C, and pipes, in several locales."""

import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.pty_terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    LEFT,
    READY,
    UP,
    PtyTerminal,
    on_a_terminal,
    pasted,
)

LOCALES = {
    "English": {"LC_ALL": "en_US.UTF-8", "LANG": "en_US.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
COMMAND = (sys.executable, "-m", "support.chat_without_a_model", "chat", "m")


class Chat:
    """Where a chat runs, and what its model was shown."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prompts_file = folder, folder / "prompts"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PETALS_TEST_PROMPTS": str(self.prompts_file),
            "PETALS_CACHE": str(folder / "cache"),
        }

    @contextmanager
    def __call__(self, locale: str = "English", *options: str) -> Iterator[PtyTerminal]:
        environment = self.environment | LOCALES[locale]
        with on_a_terminal((*COMMAND, *options), environment) as terminal:
            terminal.expect(READY)
            yield terminal

    def piped(
        self, questions: bytes, *options: str, **environment: str
    ) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [*COMMAND, *options],
            input=questions,
            env=self.environment | environment,
            capture_output=True,
            timeout=60,
        )

    @property
    def questions(self) -> list[str]:
        """The last question of each prompt that the model was shown."""
        lines = self.prompts_file.read_text(encoding="utf-8").splitlines()
        return [
            literal_eval(line).rpartition("user: ")[2].removesuffix("\nassistant:")
            for line in lines
        ]

    @property
    def last_prompt(self) -> str:
        return literal_eval(self.prompts_file.read_text(encoding="utf-8").splitlines()[-1])


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tmp_path)


def ask(terminal: PtyTerminal, keys: str, answer: str) -> None:
    terminal.type(keys + "\r")
    terminal.expect(answer)
    terminal.expect(READY)


@pytest.mark.parametrize("locale", LOCALES)
def test_ctrl_c_ends_the_answer_and_not_the_chat(chat: Chat, locale: str) -> None:
    with chat(locale) as terminal:
        terminal.type("for ever\r")
        terminal.expect("once upon")
        terminal.type(CTRL_C)
        terminal.expect("Stopped")
        terminal.expect(READY)
        ask(terminal, "hello", "<5: hello>")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.text
    assert chat.last_prompt == "user: for ever\nassistant: once upon\nuser: hello\nassistant:"


def test_a_second_ctrl_c_leaves_although_the_clean_up_waits(chat: Chat) -> None:
    with chat() as terminal:
        terminal.type("stuck\r")
        terminal.expect("once upon")
        terminal.type(CTRL_C)
        terminal.expect("closing")
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.text


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_leaves(chat: Chat) -> None:
    with chat() as terminal:
        terminal.type("not this" + CTRL_C)
        terminal.expect("Ctrl-C once more")
        terminal.expect(READY)
        ask(terminal, "this", "<4: this>")
        terminal.type(CTRL_C)
        terminal.expect(READY)
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.text
    assert chat.questions == ["this"]


def test_lines_are_edited_and_remembered(chat: Chat) -> None:
    with chat() as terminal:
        ask(terminal, "helo" + LEFT + "l", "<5: hello>")
        ask(terminal, UP + "!", "<6: hello!>")
        ask(terminal, "one" + ALT_ENTER + "two", "<7: one")
    with chat() as terminal:
        ask(terminal, UP * 3, "<6: hello!>")  # the second goes up in the two lines of the last
    assert chat.questions == ["hello", "hello!", "one\ntwo", "hello!"]
    history = chat.folder / "cache" / "chat-history"
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("locale", LOCALES)
def test_no_line_is_too_long_and_a_paste_is_one_question(chat: Chat, locale: str) -> None:
    long, several = "x" * 9_999, "Größe in €:\n/clear\n\n  end"
    with chat(locale) as terminal:
        ask(terminal, pasted(long), "<9999: x")
        ask(terminal, pasted(several), f"<{len(several)}: ")
        ask(terminal, "größer?", "<7: ")
    assert chat.questions == [long, several, "größer?"]


@pytest.mark.parametrize("locale", LOCALES)
def test_bytes_that_are_no_utf8_are_told(chat: Chat, locale: str) -> None:
    with chat(locale) as terminal:
        terminal.type(b"gr\xfcn\r")
        terminal.expect("error: The line is not UTF-8 text: byte 0xfc")
        terminal.expect(READY)
        ask(terminal, "hello", "<5: hello>")
    assert chat.questions == ["hello"]


def test_a_question_that_fails_is_asked_again(chat: Chat) -> None:
    with chat() as terminal:
        ask(terminal, "fail", "error: No server has blocks 0:2.")
        ask(terminal, "/retry", "error: No server has blocks 0:2.")
        ask(terminal, "/wonder", "There is no command /wonder")
        terminal.type("/quit\r")
        assert terminal.wait() == 0, "at a terminal the user has seen it"
    assert chat.last_prompt == "user: fail\nassistant:"


@pytest.mark.parametrize(
    ("questions", "status", "error"),
    [
        (b"hello\nagain\n", 0, b""),
        (b"hello", 0, b""),
        (b"hello\r\n\r\n/quit\n", 0, b""),
        (b"fail\nhello\n", 1, b"error: No server has blocks 0:2."),
        (b"Hel\xff\xfelo\nhello\n", 1, b"error: The line is not UTF-8 text: byte 0xff"),
        (b"/wonder\nhello\n", 1, b"There is no command /wonder"),
    ],
)
def test_a_pipe_is_told_by_the_exit_status(
    chat: Chat, questions: bytes, status: int, error: bytes
) -> None:
    result = chat.piped(questions)
    assert (result.returncode, result.stdout.count(b"<5: hello>")) == (status, 1)
    assert error in result.stderr
    assert b"Traceback" not in result.stderr
    assert b"\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize("locale", LOCALES)
def test_pipes_hold_utf8_in_every_locale(chat: Chat, locale: str) -> None:
    result = chat.piped("größer 5 €?\n".encode(), "--system", "Überlege.", **LOCALES[locale])
    assert result.returncode == 0, result.stderr
    assert chat.last_prompt == "system: Überlege.\nuser: größer 5 €?\nassistant:"
    shown = result.stdout.decode()
    assert shown.strip() in ("<11: größer 5 €?>", r"<11: gr\xf6\xdfer 5 \u20ac?>")
    assert (locale == "ASCII") == shown.isascii()
