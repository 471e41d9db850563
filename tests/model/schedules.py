"""Drawn schedules: which swarms, which steps and which faults the model check plays."""

from hypothesis import strategies as st

from support.simulation.faults import CODES, LIES, Fault, FaultKind
from support.simulation.play import LAYOUTS, Event, Rest, Schedule, Setting, Turn

ADVERSARIAL = (FaultKind.LOSE, FaultKind.REPEAT, FaultKind.OVERTAKE)
"""What no real stream does that goes on: single messages lost, repeated, reordered."""

_MOST_TOKENS = 9
_AT = st.one_of(st.integers(0, 6), st.integers(0, 24))
_SECONDS = st.sampled_from((0.02, 0.2, 0.7, 1.5, 3.0, 8.0))


def settings_of_swarms() -> st.SearchStrategy[Setting]:
    """Small logs and small memory are rare: they end what a session can survive."""
    return st.builds(
        Setting,
        layout=st.sampled_from(sorted(LAYOUTS)),
        num_rows=st.integers(1, 3),
        is_direct=st.booleans(),
        has_max_length=st.booleans(),
        latencies=st.integers(0, 5),
        kept_bytes=st.sampled_from((0, 0, 0, 0, 200)),
        log_bytes=st.sampled_from((0, 0, 0, 150)),
        has_kv_format=st.booleans(),
        chunk_tokens=st.sampled_from((2, 4, 16)),
    )


def turns() -> st.SearchStrategy[Turn]:
    """Mostly one token more for every row; sometimes a prompt, a rollback, a reorder."""
    decode = st.just(Turn((1,)))
    prompt = st.builds(Turn, st.tuples(*[st.integers(1, _MOST_TOKENS)] * 3))
    cut = st.builds(
        Turn,
        st.tuples(*[st.integers(0, 3)] * 3),
        st.tuples(*[st.integers(0, 4)] * 3),
    )
    reordered = st.builds(
        Turn,
        st.tuples(*[st.integers(0, 3)] * 3),
        st.tuples(*[st.integers(0, 2)] * 3),
        st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
    )
    return st.one_of(decode, decode, prompt, cut, reordered)


def faults(kinds: tuple[FaultKind, ...]) -> st.SearchStrategy[Fault]:
    """One fault of these kinds at any of the next messages."""
    return st.builds(
        Fault,
        kind=st.sampled_from(kinds),
        at=_AT,
        who=st.integers(0, 6),
        other=st.integers(0, 6),
        seconds=_SECONDS,
        code=st.integers(0, max(len(CODES), len(LIES)) - 1),
    )


def schedules(kinds: tuple[FaultKind, ...], max_rounds: int) -> st.SearchStrategy[Schedule]:
    """A first step, then rounds of faults of these kinds and the step that they strike; in some
    schedules the user closes the session during the last step.
    """
    some = st.lists(faults(kinds), max_size=3)
    rest = st.builds(Rest, st.sampled_from((0.1, 1.0, 9.0)))
    deed: st.SearchStrategy[Event] = st.one_of(turns(), turns(), turns(), rest)
    rounds = st.lists(st.tuples(some, deed), min_size=2, max_size=max_rounds)
    close = st.builds(Fault, st.just(FaultKind.CLOSE), at=_AT)
    end = st.one_of(st.none(), st.none(), st.none(), close)
    return st.builds(_schedule, settings_of_swarms(), turns(), rounds, end)


def _schedule(
    setting: Setting,
    first: Turn,
    rounds: list[tuple[list[Fault], Event]],
    end: Fault | None,
) -> Schedule:
    events: list[Event] = [first]
    for number, (some, deed) in enumerate(rounds):
        is_last = number == len(rounds) - 1
        events += [*some, *([end] if end is not None and is_last else []), deed]
    return Schedule(setting, tuple(events))


REALISTIC = tuple(kind for kind in FaultKind if kind not in (*ADVERSARIAL, FaultKind.CLOSE))
ALL_KINDS = (*REALISTIC, *ADVERSARIAL)
