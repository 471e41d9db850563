"""Streamers of `generate` that let something happen in the middle of a generation."""

import time
from collections.abc import Callable

import torch


class AtToken:
    """Calls ``action`` at its ``count``-th call (the prompt is the first), and notes all times."""

    def __init__(self, count: int, action: Callable[[], object]) -> None:
        self._count, self._action = count, action
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == self._count:
            self._action()

    def end(self) -> None:
        assert len(self.times) >= self._count, "the generation ended before the action"
