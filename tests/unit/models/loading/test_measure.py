import pytest
import torch

from petals.models.loading.measure import REPEATS, best_seconds, is_clearly_faster


class Bench:
    """A clock, and work that takes the seconds it is given, one value per call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> "Work":
        return Work(self, name, list(seconds))


class Work:
    def __init__(self, bench: Bench, name: str, seconds: list[float]) -> None:
        self.bench, self.name, self.seconds = bench, name, seconds

    def __call__(self) -> None:
        assert torch.is_inference_mode_enabled()
        self.bench.calls.append(self.name)
        self.bench.now += self.seconds.pop(0)


def test_the_least_of_alternating_repeats_counts() -> None:
    bench = Bench()
    one = bench.work("one", 5.0, 3.0, *[4.0] * (REPEATS - 2))
    two = bench.work("two", *[2.0] * (REPEATS - 1), 1.0)
    assert best_seconds([one, two], bench) == [3.0, 1.0]
    assert bench.calls == ["one", "two"] * REPEATS


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, True), (0.9, True), (0.95, False), (1.0, False), (2.0, False)]
)
def test_a_gain_within_the_noise_does_not_count(seconds: float, expected: bool) -> None:
    bench = Bench()
    alternative = bench.work("alternative", *[seconds] * REPEATS)
    usual = bench.work("usual", *[1.0] * REPEATS)
    assert is_clearly_faster(alternative, usual, bench) is expected
