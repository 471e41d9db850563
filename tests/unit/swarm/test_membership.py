import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.errors import AdmissionDenied, ConfigError
from petals.swarm.membership import TICKET_SECONDS, Admission, SwarmKey
from petals.types import PeerId

NOW = 1_700_000_000.0
ALICE, BOB, EVE = PeerId("alice"), PeerId("bob"), PeerId("eve")
KEY = SwarmKey(b"k" * 32)


def test_a_member_is_admitted():
    ticket = Admission(ALICE, KEY).issue(BOB, NOW)
    Admission(BOB, KEY).check(ticket, ALICE, NOW + TICKET_SECONDS / 2)


def test_an_open_swarm_admits_everybody():
    admission = Admission(BOB)
    assert admission.is_open
    assert admission.issue(ALICE, NOW) == b""
    admission.check(b"", EVE, NOW)


@pytest.mark.parametrize(
    "ticket, holder, now, bound, reason",
    [
        (b"", ALICE, NOW, b"", "private"),
        (b"\x02" * 41, ALICE, NOW, b"", "kind"),
        (Admission(ALICE, SwarmKey(b"x" * 32)).issue(BOB, NOW), ALICE, NOW, b"", "not the one"),
        (Admission(ALICE, KEY).issue(BOB, NOW), EVE, NOW, b"", "not the one"),
        (Admission(ALICE, KEY).issue(EVE, NOW), ALICE, NOW, b"", "not the one"),
        (Admission(ALICE, KEY).issue(BOB, NOW), ALICE, NOW, b"other", "not the one"),
        (Admission(BOB, KEY).issue(ALICE, NOW), ALICE, NOW, b"", "not the one"),
        (Admission(ALICE, KEY).issue(BOB, NOW), ALICE, NOW + 3 * TICKET_SECONDS, b"", "expired"),
        (Admission(ALICE, KEY).issue(BOB, NOW), ALICE, NOW - 3 * TICKET_SECONDS, b"", "expired"),
    ],
)
def test_others_are_not(ticket, holder, now, bound, reason):
    with pytest.raises(AdmissionDenied, match=reason) as caught:
        Admission(BOB, KEY).check(ticket, holder, now, bound)
    assert caught.value.hint


@given(st.binary(max_size=100))
def test_no_garbage_is_a_ticket(garbage):
    with pytest.raises(AdmissionDenied):
        Admission(BOB, KEY).check(garbage, ALICE, NOW)


def test_key_text():
    key = SwarmKey.generate()
    assert SwarmKey.parse(key.format()) == key
    assert SwarmKey.generate() != key


@pytest.mark.parametrize(
    "text", ["", "petals-swarm-key-1:", "petals-swarm-key-1:AAAA", "x:" + "A" * 44]
)
def test_other_text_is_no_key(text):
    with pytest.raises(ConfigError, match="not a swarm key"):
        SwarmKey.parse(text)
