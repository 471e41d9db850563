"""Templates as published: those that refuse a system prompt, have names, want parts, or are broken.

The right ids are those that transformers makes of the same template in the form that it accepts.
"""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from petals.cli.terminal.chat_template import ChatTemplate
from petals.errors import ConfigError

SYSTEM = {"role": "system", "content": "Be brief. "}
TALK = [
    {"role": "user", "content": "Why? "},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And then?"},
]
FOLDED = [{"role": "user", "content": "Be brief. \n\nWhy? "}, *TALK[1:]]

LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + LOOP
)
SILENT = LOOP.replace("in messages", "in messages if m['role'] != 'system'")
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% endfor %}<assistant>"
)
PARTS_OF_OBJECTS = PARTS.replace("part['type'] == 'text'", "part.type == 'text'")
GEMMA_PARTS = GEMMA.removesuffix(LOOP) + PARTS
BROKEN = {
    "syntax": "{% for m in messages %}{{ m['content'] }",
    "raises": "{{ raise_exception('Roles must alternate') }}",
    "unknown filter": "{{ messages | wonder }}",
    "adds text to a list": "{{ messages + 'x' }}",
    "divides by zero": "{{ 1 / 0 }}",
    "leaves the question out": "{{ 'Hello' }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerBase:
    """One token for each byte."""
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    bare = Tokenizer(BPE(letters, []))
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bare)
    made.chat_template = template
    return made


def stock(template: str, messages: list) -> list[int]:
    return tokenizer(template).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]


def plain(messages: list[dict[str, str]]) -> list[int]:
    lines = [f"{m['role']}: {m['content']}" for m in messages] + ["assistant:"]
    return tokenizer(None)("\n".join(lines))["input_ids"]


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, object]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def encoded(template, messages, name: str = "") -> tuple[list[int], list[str]]:
    said: list[str] = []
    chat = ChatTemplate(tokenizer(template), said.append, name)
    first, second = chat.encode(messages).tolist(), chat.encode(messages).tolist()
    assert first == second, "what is said once changes nothing"
    return first[0], said


@pytest.mark.parametrize(
    ("template", "messages", "accepted", "note"),
    [
        (LOOP, TALK, TALK, ""),
        (LOOP, [SYSTEM, *TALK], [SYSTEM, *TALK], ""),
        (GEMMA, TALK, TALK, ""),
        (GEMMA, [SYSTEM, *TALK], FOLDED, "in front of the first question"),
        (SILENT, [SYSTEM, *TALK], FOLDED, "in front of the first question"),
        (PARTS, TALK, in_parts(TALK), ""),
        (PARTS_OF_OBJECTS, TALK, in_parts(TALK), ""),
        (PARTS, [SYSTEM, *TALK], in_parts([SYSTEM, *TALK]), ""),
        (GEMMA_PARTS, [SYSTEM, *TALK], in_parts(FOLDED), "in front of the first question"),
    ],
)
def test_the_form_that_the_template_takes(template, messages, accepted, note: str) -> None:
    ids, said = encoded(template, messages)
    assert ids == stock(template, accepted)
    assert len(said) == bool(note)
    assert all(note in sentence for sentence in said)


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_broken_template_gives_plain_lines_and_a_sentence(template: str) -> None:
    ids, said = encoded(template, [SYSTEM, *TALK])
    assert ids == plain([SYSTEM, *TALK])
    (sentence,) = said
    assert sentence.startswith("The chat template cannot be used (") and "plain lines" in sentence


@pytest.mark.parametrize("template", [None, "", {}])
def test_without_a_template_lines_are_plain(template) -> None:
    assert encoded(template, TALK) == (plain(TALK), [])


NAMED = {"rag": "RAG" + LOOP, "tool_use": "TOOL" + LOOP}


def test_named_templates() -> None:
    assert encoded({**NAMED, "default": LOOP}, TALK) == (stock(LOOP, TALK), [])
    assert encoded(NAMED, TALK, "tool_use") == (stock(NAMED["tool_use"], TALK), [])
    ids, said = encoded(NAMED, TALK)
    assert ids == stock(NAMED["rag"], TALK)
    assert len(said) == 1 and "rag, tool_use" in said[0] and "--chat-template" in said[0]


@pytest.mark.parametrize("template", [NAMED, LOOP, None])
def test_a_name_that_no_template_has_is_refused(template) -> None:
    with pytest.raises(ConfigError):
        encoded(template, TALK, "wonder")
