"""Characters appear when they are whole, and the numbers under an answer are right."""

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


@pytest.mark.parametrize(
    ("text", "cut", "shown"),
    [
        ("hi", None, ["h", "i"]),  # the prompt is not repeated
        ("a€b", None, ["a", "€", "b"]),  # shown when all bytes of a character are there,
        ("a€", 3, ["a", "\ufffd"]),  # or at the end
    ],
)
def test_whole_characters_are_shown(text: str, cut: int | None, shown: list[str]) -> None:
    pieces: list[str] = []
    stream = WordStream(ByteTokenizer(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    tokens = text.encode()[:cut]
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    assert [piece for piece in pieces if piece] == shown
    assert (stream.num_tokens, stream.text) == (len(tokens), "".join(shown))


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
    assert answer(1, 0.5).tokens_per_second == 0.0


def test_the_line_names_servers_blocks_and_speed() -> None:
    assert describe(answer(21, 2.5)) == (
        "21 tokens through 0:10 at …alpha1 (0.0 ms) → 10:30 at …bravo2 (0.0 ms); "
        "first token after 0.50 s, then 10.0 tokens/s"
    )


@pytest.mark.parametrize(
    ("way", "words"), [(Way.RELAYED, "(relayed)"), (Way.VIA_CLIENT, "(via the client)")]
)
def test_a_way_that_is_not_direct_is_named(way: Way, words: str) -> None:
    assert f"alpha1 (0.0 ms) → {words} → 10:30" in describe(answer(2, 1.0, way))


def test_repairs_are_named_with_the_longest_stall() -> None:
    repairs = tuple(
        Repair(PeerId(f"12D3KooW{name}"), BlockSpan(0, 10), "gone", (), seconds)
        for name, seconds in (("alpha1", 0.25), ("bravo2", 0.75))
    )
    line = describe(answer(2, 1.0, repairs=repairs))
    assert line.endswith("; mended 0:10 of …alpha1, 0:10 of …bravo2 in 0.75 s at most")
