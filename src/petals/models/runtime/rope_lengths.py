"""Rope lengths: for every token, the number of tokens of its row after the forward that ran it.

Models with dynamic or LongRoPE scaling choose the rotary factors by that number, so a token keeps
it for as long as it may be run again: in a piece of a prompt, in a replay, after a rollback. A
token's rope length is at least its position + 1. Knows numbers only.
"""

from collections.abc import Sequence
from itertools import chain, groupby, repeat

from petals.errors import BadInput

RopeRuns = tuple[tuple[int, int], ...]
"""(number of tokens, rope length) of successive tokens; empty: see ``whole_forward``."""


def whole_forward(starts: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """Rope lengths of ``counts[r]`` tokens of row r from ``starts[r]`` that run as one forward."""
    return per_token([start + count for start, count in zip(starts, counts)], counts)


def per_token(lengths: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """Rope lengths of ``counts[r]`` tokens of row r, which are all ``lengths[r]``."""
    rows = (repeat(length, count) for length, count in zip(lengths, counts))
    return tuple(chain.from_iterable(rows))


def to_runs(starts: Sequence[int], counts: Sequence[int], lengths: tuple[int, ...]) -> RopeRuns:
    """``lengths`` of the tokens as a message brings them."""
    if lengths == whole_forward(starts, counts):
        return ()
    return tuple((sum(1 for _ in run), length) for length, run in groupby(lengths))


def from_runs(starts: Sequence[int], counts: Sequence[int], runs: RopeRuns) -> tuple[int, ...]:
    """The rope length of each token, in packed order. Raises BadInput for runs that cannot be."""
    if not runs:
        return whole_forward(starts, counts)
    if sum(count for count, _ in runs) != sum(counts):
        raise BadInput(
            f"Rope lengths came for {sum(count for count, _ in runs)} tokens instead of "
            f"{sum(counts)}.",
            hint="Give one for every token, or none if the tokens are a whole forward.",
        )
    lengths = per_token([length for _, length in runs], [count for count, _ in runs])
    positions = chain.from_iterable(range(s, s + count) for s, count in zip(starts, counts))
    if any(length <= position for length, position in zip(lengths, positions)):
        raise BadInput(
            "A token's rope length is below its position + 1.",
            hint="It is the length of the row after the forward that the token belongs to.",
        )
    return lengths
