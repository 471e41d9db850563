"""A conversation as the token ids that a model's chat template makes of it.

Knows the tokenizers of transformers. Must not know the network and the terminal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from petals.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ChatMessage = dict[str, str]

_FOLDED = "The chat template takes no system prompt: its text goes in front of the first question."
_HINT_NAME = "Name one of them: --chat-template NAME."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """One way to hand a conversation to a template. ``note`` is said when it is used."""

    messages: list[dict[str, Any]]
    note: str = ""


@dataclass(slots=True)
class ChatTemplate:
    """Encodes conversations. ``name`` chooses among several named templates of the tokenizer.

    Templates differ in what they accept: some refuse a system prompt or leave it out, some want the
    content as a list of parts, some have errors. A form of the conversation is right if what the
    template makes of it holds the system prompt and the last question. Without such a form the
    conversation is sent as plain lines. ``say`` gets one sentence about each such thing, once.
    """

    tokenizer: "PreTrainedTokenizerBase"
    say: Callable[[str], None]
    name: str = ""
    _said: set[str] = field(default_factory=set)

    def encode(self, messages: list[ChatMessage]) -> "torch.Tensor":
        """Token ids [1, n] of a conversation that the model is to answer.

        Raises ConfigError for a name that no template has.
        """
        template = self._template()
        if template is not None:
            wanted = [*_texts(messages, "system"), *_texts(messages, "user")[-1:]]
            reason = "it leaves the question out"
            for form in _forms(messages):
                rendered, error = self._render(template, form.messages)
                if error:
                    reason = error
                elif all(text in rendered for text in wanted):
                    self._note(form.note)
                    return self._ids(template, form.messages)
            self._note(
                f"The chat template cannot be used ({reason}): plain lines are sent instead."
            )
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        encoded = self.tokenizer("\n".join([*lines, "assistant:"]), return_tensors="pt")
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def _template(self) -> str | None:
        """The text of the template; None if there is none."""
        found: str | dict[str, str] | None = self.tokenizer.chat_template
        if not isinstance(found, dict):
            if self.name:
                raise ConfigError("The model has no named chat templates.", hint="Leave it out.")
            return found or None
        if self.name and self.name not in found:
            raise ConfigError(
                f"No chat template is named {self.name!r}; there are {', '.join(sorted(found))}.",
                hint=_HINT_NAME,
            )
        if self.name or "default" in found:
            return found[self.name or "default"]
        first = next(iter(found), None)
        if first is None:
            return None
        names = ", ".join(found)
        self._note(
            f"The chat templates are {names}, without a default: {first} is used. {_HINT_NAME}"
        )
        return found[first]

    def _render(self, template: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """The prompt as text, and an empty reason; or an empty prompt, and why it fails."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        # A template is a program of the repository, and each of these can come out of one.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            return "", _first_line(error)
        except (RecursionError, ValueError) as error:
            return "", _first_line(error)
        return str(rendered), ""

    def _ids(self, template: str, messages: list[dict[str, Any]]) -> "torch.Tensor":
        encoded = self.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def _note(self, text: str) -> None:
        if text and text not in self._said:
            self._said.add(text)
            self.say(text)


def _forms(messages: list[ChatMessage]) -> Iterator[_Form]:
    """The conversation as it is, with its system prompt folded into the first question, and both
    with content in parts, as the templates of multimodal models want it.
    """
    plain: list[dict[str, Any]] = list(messages)
    folded = _fold(messages)
    for note, form in (("", plain), (_FOLDED, folded)):
        if form is not None:
            yield _Form(messages=form, note=note)
    for note, form in (("", plain), (_FOLDED, folded)):
        if form is not None:
            yield _Form(messages=[_in_parts(message) for message in form], note=note)


def _fold(messages: list[ChatMessage]) -> list[dict[str, Any]] | None:
    """None without a system prompt."""
    if messages[0]["role"] != "system":
        return None
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _texts(messages: list[ChatMessage], role: str) -> list[str]:
    return [message["content"].strip() for message in messages if message["role"] == role]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
