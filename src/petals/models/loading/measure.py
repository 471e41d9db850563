"""Micro-benchmarks that choose between ways to compute the same result on this machine.

Knows no modules and no models; it times functions.
"""

import time
from collections.abc import Callable, Sequence

import torch

Stopwatch = Callable[[], float]
"""Seconds since a fixed point."""

MIN_SPEEDUP = 1.08
"""An alternative is used if the usual way takes more than this many times its seconds; a smaller
gain is within the noise of the measurement.
"""

MIN_MATRIX_BYTES = 2**20
"""Size of a matrix (bytes) below which its layout is not worth a measurement: smaller ones stay in
the processor's cache, where every layout is equally fast.
"""

REPEATS = 5
"""Rounds of one measurement."""


def best_seconds(
    candidates: Sequence[Callable[[], object]], stopwatch: Stopwatch = time.perf_counter
) -> list[float]:
    """The least seconds that each candidate took in ``REPEATS`` rounds, without gradients.

    Other processes only ever add time, so the least of several repeats is the best estimate. Each
    round runs every candidate once: a load that lasts for some rounds slows all of them alike.
    """
    best = [float("inf")] * len(candidates)
    with torch.inference_mode():
        for _ in range(REPEATS):
            for index, candidate in enumerate(candidates):
                started = stopwatch()
                candidate()
                best[index] = min(best[index], stopwatch() - started)
    return best


def is_clearly_faster(
    alternative: Callable[[], object],
    usual: Callable[[], object],
    stopwatch: Stopwatch = time.perf_counter,
) -> bool:
    """Whether ``alternative`` is more than ``MIN_SPEEDUP`` times as fast as ``usual``."""
    alternative_seconds, usual_seconds = best_seconds([alternative, usual], stopwatch)
    return alternative_seconds * MIN_SPEEDUP < usual_seconds
