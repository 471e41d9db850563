"""Asking a model in the swarm one question, and showing the text as it arrives.

For generate, chat and demo. Must not know servers, wire and processes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from petals.client.trace import SessionTrace
from petals.logs import plural

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """The answer, its route and its speed. Seconds are measured at the client."""

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    first_token_seconds: float
    total_seconds: float
    trace: SessionTrace

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token; 0 for an answer of one token."""
        rest = self.total_seconds - self.first_token_seconds
        return (self.num_new_tokens - 1) / rest if rest > 0 else 0.0


@dataclass(slots=True)
class WordStream:
    """A streamer for `generate`: passes complete text on and measures the times."""

    tokenizer: "PreTrainedTokenizerBase"
    show: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)
    first_token_seconds: float = 0.0
    _ids: list[int] = field(default_factory=list)
    _shown: str = ""
    _past_prompt: bool = False

    def put(self, value: "torch.Tensor") -> None:
        """Take the prompt once, then the new token ids, as `generate` hands them over."""
        if not self._past_prompt:
            self._past_prompt = True
            return
        if not self._ids:
            self.first_token_seconds = time.monotonic() - self.began
        self._ids.extend(value.reshape(-1).tolist())
        self._show_whole()

    def end(self) -> None:
        """Show the rest; nothing of an answer that has failed before its first token."""
        if self._ids:
            self._show_whole(last=True)

    @property
    def text(self) -> str:
        return self._shown

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def _show_whole(self, last: bool = False) -> None:
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        # A character whose bytes are spread over tokens decodes to U+FFFD until it is complete.
        if text.endswith("\ufffd") and not last:
            return
        new, self._shown = text[len(self._shown) :], text  # first: Ctrl-C may end ``show``
        self.show(new)


def ask(
    model: Any,  # noqa: ANN401
    input_ids: "torch.Tensor",
    stream: WordStream,
    **generation: object,
) -> ChatReply:
    """Generate from `input_ids` `[1, n]` in a session of its own.

    Raises what `generate` of a distributed model raises: RouteError, PeerError, RequestError.
    """
    num_prompt_tokens = input_ids.shape[1]
    limit = generation["max_new_tokens"]
    assert isinstance(limit, int)
    stream.began = time.monotonic()
    with model.inference_session(max_length=num_prompt_tokens + limit) as session:
        model.generate(input_ids, session=session, streamer=stream, **generation)
        trace = session.trace
    return ChatReply(
        text=stream.text,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=stream.num_tokens,
        first_token_seconds=stream.first_token_seconds,
        total_seconds=time.monotonic() - stream.began,
        trace=trace,
    )


def describe(answer: ChatReply) -> str:
    """The route, with the median time of a step at each server, and the speed, in one line."""
    return (
        f"{plural(answer.num_new_tokens, 'token')} through {answer.trace}; "
        f"first token after {answer.first_token_seconds:.2f} s, "
        f"then {answer.tokens_per_second:.1f} tokens/s{_mended(answer.trace)}"
    )


def _mended(trace: SessionTrace) -> str:
    """The servers that were lost, and the longest pause; empty if none was."""
    if not trace.repairs:
        return ""
    longest = max(repair.stall_seconds for repair in trace.repairs)
    lost = ", ".join(f"{repair.blocks} of …{repair.peer_id[-6:]}" for repair in trace.repairs)
    return f"; mended {lost} in {longest:.2f} s at most"
