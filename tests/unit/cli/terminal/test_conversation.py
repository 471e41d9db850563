"""What a line means in a chat: a question, or a command that is carried out or refused."""

import json
from pathlib import Path

import pytest

from petals.cli.terminal.conversation import COMMAND_NAMES, HELP, ChatTurns, react

SYSTEM = {"role": "system", "content": "Be brief."}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def talked(*texts: str, system: str = "") -> ChatTurns:
    """A conversation of questions with their answers."""
    conversation = ChatTurns(system=system)
    for question, answer in zip(texts[::2], texts[1::2]):
        conversation.messages(question)
        conversation.add(question, answer)
    return conversation


@pytest.mark.parametrize(
    "line",
    ["why?", "/etc/hosts: what is it?", " /help", "/* a comment */", "a\n/help", "//", "/", "1/2"],
)
def test_questions(line: str) -> None:
    assert react(line, ChatTurns()).question == line.strip()


def test_an_empty_line_is_nothing() -> None:
    effect = react("  ", ChatTurns())
    assert not (effect.question or effect.words or effect.leaves or effect.refused)


@pytest.mark.parametrize("line", ["/foo", "/sytem x", "/Help", "/retry", "/save"])
def test_what_cannot_be_done_is_told(line: str) -> None:
    effect = react(line, ChatTurns())
    assert effect.refused and effect.words and not effect.question


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_names_every_command(name: str) -> None:
    assert name in HELP
    assert not react(name, talked("a", "b")).question.startswith("/")


@pytest.mark.parametrize("line", ["/clear", "/new"])
def test_clear_keeps_the_system_prompt(line: str) -> None:
    conversation = talked("a", "b", system="Be brief.")
    react(line, conversation)
    assert conversation.messages("c") == [SYSTEM, *turns("c")]


def test_retry_forgets_the_answer() -> None:
    conversation = talked("a", "b", "c", "d")
    assert react("/retry", conversation).question == "c"
    assert conversation.messages("c") == turns("a", "b", "c")


def test_retry_of_a_failed_question_keeps_the_answers_before() -> None:
    conversation = talked("a", "b")
    conversation.messages("a")  # asked again, and failed
    assert react("/retry", conversation).question == "a"
    assert conversation.messages("a") == turns("a", "b", "a")


def test_retry_after_clear_asks_the_question_alone() -> None:
    conversation = talked("a", "b")
    react("/clear", conversation)
    assert react("/retry", conversation).question == "a"
    assert conversation.messages("a") == turns("a")


def test_system_is_shown_set_and_removed() -> None:
    conversation = talked("a", "b")
    react("/system Be brief.", conversation)
    assert conversation.messages("c") == [SYSTEM, *turns("a", "b", "c")]
    assert react("/system", conversation).words == "Be brief."
    react("/system -", conversation)
    assert conversation.messages("c") == turns("a", "b", "c")


def test_save_writes_the_messages_and_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "my chat.json"
    conversation = talked("größer?", "ja", system="Be brief.")
    assert react(f"/save {file}", conversation).words == f"3 messages written to {file}."
    assert json.loads(file.read_text(encoding="utf-8")) == [SYSTEM, *turns("größer?", "ja")]
    again = react(f"/save {file}", talked())
    assert again.refused and "exists already" in again.words
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 3
    assert react(f"/save {tmp_path}/none/x.json", conversation).refused
