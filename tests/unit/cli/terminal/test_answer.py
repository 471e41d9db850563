"""Words appear when they are whole, and the numbers under an answer are right."""

import pytest
import torch

from petals.cli.terminal.answer import ChatReply, WordStream, describe
from petals.client.trace import EdgeTrace, HopTrace, Repair, SessionTrace, Way
from petals.types import BlockSpan, PeerId


class ByteTokenizer:
    """One token per byte, so that a character can be spread over several tokens."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


def stream_of(text: str, *, cut: int | None = None) -> tuple[WordStream, list[str]]:
    shown: list[str] = []
    stream = WordStream(ByteTokenizer(), shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in text.encode()[:cut]:
        stream.put(torch.tensor([token]))
    stream.end()
    return stream, [piece for piece in shown if piece]


def test_the_prompt_is_not_repeated() -> None:
    stream, shown = stream_of("hi")
    assert shown == ["h", "i"]
    assert stream.num_tokens == 2
    assert stream.text == "hi"


def test_a_character_is_shown_when_all_its_bytes_are_there() -> None:
    stream, shown = stream_of("a€b")
    assert shown == ["a", "€", "b"]
    assert stream.num_tokens == 5


def test_a_character_cut_off_at_the_end_is_still_shown() -> None:
    stream, shown = stream_of("a€", cut=3)
    assert shown == ["a", "\ufffd"]


def answer(
    num_new_tokens: int,
    total_seconds: float,
    way: Way = Way.DIRECT,
    repairs: tuple[Repair, ...] = (),
) -> ChatReply:
    hops = (
        HopTrace(PeerId("12D3KooWalpha1"), BlockSpan(0, 10), ()),
        HopTrace(PeerId("12D3KooWbravo2"), BlockSpan(10, 30), ()),
    )
    return ChatReply(
        text="",
        num_prompt_tokens=7,
        num_new_tokens=num_new_tokens,
        first_token_seconds=0.5,
        total_seconds=total_seconds,
        trace=SessionTrace(hops, (), (EdgeTrace(hops[0].peer_id, hops[1].peer_id, way),), repairs),
    )


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert answer(21, 2.5).tokens_per_second == pytest.approx(10.0)


def test_one_token_has_no_speed() -> None:
    assert answer(1, 0.5).tokens_per_second == 0.0


def test_the_line_names_servers_blocks_and_speed() -> None:
    assert describe(answer(21, 2.5)) == (
        "21 tokens through 0:10 at …alpha1 (0.0 ms) → 10:30 at …bravo2 (0.0 ms); "
        "first token after 0.50 s, then 10.0 tokens/s"
    )


def test_a_way_that_is_not_direct_is_named() -> None:
    assert "alpha1 (0.0 ms) → 10:30" in describe(answer(2, 1.0))
    assert "alpha1 (0.0 ms) → (relayed) → 10:30" in describe(answer(2, 1.0, Way.RELAYED))
    assert "(via the client)" in describe(answer(2, 1.0, Way.VIA_CLIENT))


def test_what_was_mended_is_said_with_the_longest_stall() -> None:
    repairs = tuple(
        Repair(PeerId(f"12D3KooW{name}"), BlockSpan(0, 10), "gone", (), seconds)
        for name, seconds in (("alpha1", 0.25), ("bravo2", 0.75))
    )
    assert "mended" not in describe(answer(2, 1.0))
    line = describe(answer(2, 1.0, repairs=repairs))
    assert line.endswith("; mended 0:10 of …alpha1, 0:10 of …bravo2 in 0.75 s at most")
