"""Importing large libraries quickly. Must not know which."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """The garbage collector is switched off inside.

    Importing torch and transformers makes a million objects that stay, and the collector scans
    them again and again: 7 % of the time (8.4 and 7.8 s, medians of ten on 2 slow cores).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
