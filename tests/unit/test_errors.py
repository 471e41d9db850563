"""Every error has a place in the tree, a meaning, a hint and a way over the wire."""

import pytest

from petals.errors import ERRORS_BY_CODE, PeerFailed, PetalsError, from_wire
from petals.wire.handshake import Refusal


@pytest.mark.parametrize("kind", ERRORS_BY_CODE.values(), ids=ERRORS_BY_CODE)
class TestEach:
    def test_has_a_code_of_its_own(self, kind: type[PetalsError]) -> None:
        assert "code" in vars(kind)

    def test_says_what_it_means(self, kind: type[PetalsError]) -> None:
        assert vars(kind)["__doc__"].strip().endswith(".")

    def test_has_a_default_hint(self, kind: type[PetalsError]) -> None:
        assert "default_hint" in vars(kind)
        assert kind("It went wrong.").hint.endswith(".") or "?" in kind("x").hint
        assert kind("It went wrong.", hint="Do this.").hint == "Do this."

    def test_arrives_as_what_it_was(self, kind: type[PetalsError]) -> None:
        sent = Refusal.of(kind("It went wrong.", hint="Do this."))
        received = sent.to_error("12D3KooWabcdef")
        assert type(received) is kind
        assert str(received) == (
            f"Peer …abcdef says: It went wrong. (Do this.)\nhint: {kind.default_hint}"
        )


def test_a_code_from_the_future() -> None:
    error = from_wire("sunspots", "The sun is bright.", "", "peer")
    assert type(error) is PeerFailed
    assert error.hint
