"""Every error has a place in the tree, a hint, a way over the wire and a line in the manual."""

import re
from pathlib import Path

import pytest

from petals.errors import ERRORS_BY_CODE, PeerFailed, PetalsError, from_wire
from petals.wire.handshake import Refusal

MANUAL = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)


def described() -> dict[str, tuple[str, str, str]]:
    """Code -> class, when, what to do."""
    rows = ROW.findall(MANUAL.read_text(encoding="utf-8"))
    assert len({code for code, *_ in rows}) == len(rows)
    return {code: (name, when, do) for code, name, when, do in rows}


def test_the_manual_lists_every_error_and_no_other() -> None:
    expected = {code: kind.__name__ for code, kind in ERRORS_BY_CODE.items() if code != "error"}
    assert {code: name for code, (name, _, _) in described().items()} == expected


def test_the_manual_says_which_may_be_tried_again() -> None:
    text = MANUAL.read_text(encoding="utf-8")
    one_server = text.partition("## One server")[2].partition("\n## ")[0]
    for code, (_, when, _) in described().items():
        said = "retryable" in when or f"| `{code}` |" in one_server
        assert said == ERRORS_BY_CODE[code].retryable, code


@pytest.mark.parametrize("kind", ERRORS_BY_CODE.values(), ids=ERRORS_BY_CODE)
class TestEach:
    def test_has_a_code_of_its_own(self, kind: type[PetalsError]) -> None:
        assert "code" in vars(kind)

    def test_has_a_hint_even_if_nobody_thought_of_one(self, kind: type[PetalsError]) -> None:
        assert "default_hint" in vars(kind)
        assert kind("It went wrong.").hint.endswith(".") or "?" in kind("x").hint
        assert kind("It went wrong.", hint="Do this.").hint == "Do this."

    def test_arrives_as_what_it_was(self, kind: type[PetalsError]) -> None:
        sent = Refusal.of(kind("It went wrong.", hint="Do this."))
        received = sent.to_error("12D3KooWabcdef")
        assert type(received) is kind
        assert received.reported
        words = "Peer …abcdef says: It went wrong. (Do this.)"
        assert str(received) == f"{words}\nhint: {kind.default_hint}", "the hint is ours"


def test_a_code_from_the_future() -> None:
    error = from_wire("sunspots", "The sun is bright.", "", "peer")
    assert type(error) is PeerFailed
    assert error.hint
