"""When the tokens of a generation came: a streamer for `generate`."""

import time
from itertools import pairwise

import torch


class TokenTimes:
    """Notes the time (s) of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def gaps(self) -> list[float]:
        """Seconds until each token; the first is the prefill's."""
        return [after - before for before, after in pairwise(self.times)]
