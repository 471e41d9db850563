"""Which jobs share a batch, in tokens, and how long it waits for more decode steps, in seconds."""

from collections.abc import Iterator

import pytest

from petals.server.compute.scheduler import (
    BatchCost,
    BatchWindow,
    Portion,
    Scheduler,
    WaitingJob,
)
from petals.server.policies import SchedulerConfig

FIXED = 0.012
GRACE = 0.15 * FIXED
LATENESS = FIXED / 2


class Plan(Scheduler):
    """A scheduler that knows the cost of batches from the start."""

    def __init__(
        self, fixed_seconds: float = 0.02, seconds_per_token: float = 0.001, **changes: float
    ) -> None:
        self.cost = BatchCost(fixed_seconds, seconds_per_token)
        super().__init__(SchedulerConfig(**changes), self.cost)


def decode(key: int, owner: str = "writer", num_tokens: int = 1) -> WaitingJob:
    return WaitingJob(key, owner, num_tokens, session=key, is_urgent=True)


def prefill(key: int, owner: str, num_tokens: int) -> WaitingJob:
    return WaitingJob(key, owner, num_tokens, session=key)


def training(key: int, owner: str, num_tokens: int) -> WaitingJob:
    return WaitingJob(key, owner, num_tokens)


class Device:
    """Runs what a scheduler plans; batches take what its own model of the cost says."""

    def __init__(self, plan: Plan, *jobs: WaitingJob, cost: BatchCost | None = None) -> None:
        self.plan, self.cost = plan, cost
        self.left: dict[int, int] = {}
        self.add(*jobs)

    def add(self, *jobs: WaitingJob) -> None:
        for job in jobs:
            self.plan.add(job, 0.0)
            self.left[job.key] = job.cost_tokens

    def run(self) -> dict[int, int]:
        """One batch: job -> tokens."""
        batch = self.plan.next_batch()
        num_tokens = sum(portion.num_tokens for portion in batch)
        cost = self.cost or self.plan.cost
        self.plan.ran(batch, cost.seconds(num_tokens))
        for portion in batch:
            self.left[portion.key] -= portion.num_tokens
        self.plan.finish([p.key for p in batch if self.left[p.key] <= 0], 0.0)
        return {portion.key: portion.num_tokens for portion in batch}

    def batches(self) -> Iterator[dict[int, int]]:
        """Until no job waits."""
        while len(self.plan):
            yield self.run()


def test_without_jobs_no_batch_runs() -> None:
    assert Plan().next_batch() == ()
    assert Plan().wait_seconds(0.0) is None


def test_all_decodes_run_together() -> None:
    device = Device(Plan(), *(decode(key, f"peer {key % 3}") for key in range(20)))
    assert device.run() == dict.fromkeys(range(20), 1)
    assert len(device.plan) == 0 and device.plan.waiting_tokens == 0


def test_a_decode_beside_a_long_prompt_never_waits_longer_than_the_budget() -> None:
    device = Device(Plan(latency_budget_seconds=0.1))
    device.add(prefill(0, "reader", 5000))
    for key in range(1, 400):
        device.add(decode(key))
        batch = device.run()
        assert batch[key] == 1
        assert device.plan.cost.seconds(sum(batch.values())) <= 0.1
        if not len(device.plan):
            break
    # The prompt moves on at the speed that the budget leaves it: 79 tokens beside each decode.
    assert key == pytest.approx(5000 / 79, abs=1)


def test_between_two_tokens_of_a_writer_the_prompt_still_runs_in_short_batches() -> None:
    device = Device(Plan(latency_budget_seconds=0.1, idle_budget_seconds=0.5))
    device.add(prefill(0, "reader", 100_000))
    assert device.run() == {0: 480}
    device.add(decode(1))
    assert device.plan.wait_seconds(0.0) == 0
    device.run()
    assert device.run() == {0: 80}
    for _ in range(20):
        last = device.run()
    assert last == {0: 480}


def test_decodes_that_need_longer_than_the_budget_may_be_doubled() -> None:
    device = Device(Plan(0.05, 0.002, latency_budget_seconds=0.1))
    device.add(*(decode(key) for key in range(64)), prefill(99, "reader", 1000))
    # 64 decodes take 0.178 s; a batch of twice that holds 153 tokens.
    assert device.run()[99] == 153 - 64


def test_a_slow_machine_still_reads_prompts() -> None:
    device = Device(Plan(1.0, 1.0, min_chunk_tokens=16), prefill(0, "reader", 40))
    assert list(device.batches()) == [{0: 16}, {0: 16}, {0: 8}]


def test_batches_are_bounded() -> None:
    device = Device(Plan(seconds_per_token=1e-9, max_batch_tokens=100))
    device.add(prefill(0, "reader", 250), *(decode(key, num_tokens=4) for key in range(1, 31)))
    sizes = [sum(batch.values()) for batch in device.batches()]
    assert max(sizes) == 100
    assert sum(sizes) == 250 + 30 * 4


def test_a_decode_larger_than_any_batch_is_cut() -> None:
    device = Device(Plan(max_batch_tokens=6, min_chunk_tokens=1))
    device.add(decode(0, num_tokens=15), decode(1, num_tokens=2))
    assert list(device.batches()) == [{0: 6}, {1: 2}, {0: 6}, {0: 3}]


def test_peers_share_whatever_the_length_of_their_prompts() -> None:
    device = Device(Plan(max_batch_tokens=100, seconds_per_token=1e-6))
    device.add(*(prefill(key, "greedy", 1000) for key in range(4)), prefill(10, "modest", 300))
    served = {"greedy": 0, "modest": 0}
    while served["modest"] < 300:
        for key, num_tokens in device.run().items():
            served["modest" if key == 10 else "greedy"] += num_tokens
    assert served["greedy"] <= 400


def test_a_newcomer_does_not_jump_ahead_for_ever_and_does_not_pay_for_the_past() -> None:
    device = Device(Plan(max_batch_tokens=100, seconds_per_token=1e-6))
    device.add(prefill(0, "old", 10_000))
    for _ in range(50):
        device.run()
    device.add(prefill(1, "new", 10_000))
    shares = {0: 0, 1: 0}
    for _ in range(20):
        for key, num_tokens in device.run().items():
            shares[key] += num_tokens
    assert shares == {0: 1000, 1: 1000}


def test_prompts_of_one_peer_take_turns() -> None:
    device = Device(Plan(max_batch_tokens=100, seconds_per_token=1e-6))
    device.add(prefill(0, "peer", 300), prefill(1, "peer", 300))
    assert [list(device.run()) for _ in range(4)] == [[0], [1], [0], [1]]


def test_passes_run_below_prompts_and_do_not_starve() -> None:
    device = Device(Plan(max_batch_tokens=10, seconds_per_token=1e-6, forward_every=8))
    device.add(training(0, "trainer", 100), prefill(1, "reader", 1000))
    order = [key for _ in range(18) for key in device.run()]
    assert order == ([1] * 8 + [0]) * 2
    assert device.plan.waiting_tokens == 1000 - 160 + 80


def test_a_part_of_a_pass_runs_alone_and_a_decode_waits_no_longer_than_the_budget() -> None:
    device = Device(Plan(0.0, latency_budget_seconds=0.1, idle_budget_seconds=0.5))
    device.add(training(0, "trainer", 5000))
    assert device.run() == {0: 500}
    device.add(decode(1))
    assert device.run() == {1: 1}
    assert device.run() == {0: 100}


def test_parts_of_passes_have_a_price_of_their_own() -> None:
    device = Device(Plan(0.0), training(0, "trainer", 100_000), cost=BatchCost(0.0, 0.002))
    for _ in range(50):
        device.run()
    assert device.run()[0] == pytest.approx(250, abs=3)
    device.add(prefill(1, "reader", 1000))
    assert device.run() == {1: 500}


def test_passes_of_one_peer_do_not_take_turns_but_peers_do() -> None:
    device = Device(Plan(max_batch_tokens=100, seconds_per_token=1e-6))
    device.add(training(0, "a", 200), training(1, "a", 200), training(2, "b", 200))
    assert [list(batch) for batch in device.batches()] == [[0], [2], [0], [2], [1], [1]]


def test_a_job_without_tokens_runs_too() -> None:
    device = Device(Plan(), decode(0, num_tokens=0), prefill(1, "peer", 0))
    assert device.plan.next_batch() == (Portion(0, 0), Portion(1, 0))


def test_discarded_jobs_never_run() -> None:
    device = Device(Plan(), prefill(0, "peer", 10), decode(1))
    device.plan.discard(0)
    device.plan.discard(7)
    assert device.run() == {1: 1}


class TestBatchCost:
    def test_it_learns_what_batches_take(self) -> None:
        cost = BatchCost(0.0, 0.1)
        for _ in range(300):
            for num_tokens in (1, 8, 64, 256):
                cost.observe(num_tokens, 0.03 + 0.002 * num_tokens)
        assert cost.seconds(1) == pytest.approx(0.032, rel=0.05)
        assert cost.seconds(256) == pytest.approx(0.542, rel=0.05)
        assert cost.tokens_within(0.1) == pytest.approx(35, abs=2)

    def test_a_wild_measurement_does_not_break_it(self) -> None:
        cost = BatchCost(0.03, 0.002)
        cost.observe(1, 1000.0)
        for _ in range(100):
            cost.observe(1, 0.032)
            cost.observe(128, 0.286)
        assert cost.seconds(128) == pytest.approx(0.286, rel=0.1)
        assert cost.tokens_within(0.0) == 0


def regulars(*absence: float) -> BatchWindow:
    """Sessions 0, 1, ... that each left at time 0 in a batch of its own, and stay away so long."""
    window = BatchWindow()
    for session, seconds in enumerate(absence):
        window.step_ready(session, -2 * seconds)
        window.batch_done([session], -seconds)
        window.step_ready(session, 0.0)
        window.batch_done([session], 0.0)
    return window


def batch_peers(*absence: float) -> BatchWindow:
    """The same, but their last steps ran as one batch."""
    window = regulars(*absence)
    for session in range(len(absence)):
        window.step_ready(session, 0.0)
    window.batch_done(range(len(absence)), 0.0)
    return window


@pytest.mark.parametrize(
    ("window", "events"),
    [
        (regulars(0.050), [(0, 0.050, 0)]),
        (regulars(0.050, 0.060), [(0, 0.050, 0.010 + LATENESS), (1, 0.060, 0)]),
        # Session 1 does not come, and is not waited for again.
        (
            regulars(0.050, 0.055),
            [(0, 0.050, 0.005 + LATENESS), (None, 0.055 + LATENESS, 0), (None, 0.075, 0)],
        ),
        # Another may follow an arrival at once.
        (regulars(0.050, 0.150), [(0, 0.050, GRACE), (None, 0.050 + GRACE, 0)]),
        (
            batch_peers(0.050, 0.070, 0.070),
            [(0, 0.050, 1.5 * FIXED), (1, 0.055, 1.5 * FIXED - 0.005), (2, 0.056, 0)],
        ),
        # A batch peer has a longer route now.
        (batch_peers(0.050, 0.200), [(0, 0.050, GRACE)]),
    ],
    ids=["alone", "nearly here", "absent", "close behind", "batch peers", "longer route"],
)
def test_how_long_a_batch_waits(window: BatchWindow, events: list) -> None:
    """Each event: which session's step is ready (None: a wait is over), when, and the next wait."""
    num_ready = 0
    for session, now, wait in events:
        if session is not None:
            window.step_ready(session, now)
            num_ready += 1
        assert window.wait_seconds(num_ready, FIXED, now) == pytest.approx(wait)


@pytest.mark.parametrize(("due_in", "waits"), [(0.001, True), (0.011, True), (0.013, False)])
def test_a_session_is_waited_for_if_due_within_a_fixed_time(due_in: float, waits: bool) -> None:
    window = regulars(0.050, 0.050 + due_in)
    window.step_ready(0, 0.050 - GRACE)
    assert (window.wait_seconds(1, FIXED, 0.050) > 0) is waits


def test_a_batch_peer_that_does_not_come_is_left_behind() -> None:
    window = batch_peers(0.050, 0.050)
    window.step_ready(0, 0.050)
    wait = window.wait_seconds(1, FIXED, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050 + wait) == 0
    window.batch_done([0], 0.080)
    window.step_ready(1, 0.100)
    window.batch_done([1], 0.110)
    window.step_ready(0, 0.130)
    assert window.wait_seconds(1, FIXED, 0.130 + GRACE) == 0


def test_new_sessions_are_batch_peers_too_but_not_for_long() -> None:
    window = BatchWindow()
    for session in (0, 1):
        window.step_ready(session, 0.0)
    window.batch_done([0, 1], 0.0)
    window.step_ready(0, 0.030)
    assert window.wait_seconds(1, FIXED, 0.030) == pytest.approx(1.5 * FIXED)
    window.batch_done([0], 0.050)
    window.step_ready(0, 1.1)
    assert window.wait_seconds(1, FIXED, 1.1) == 0


def test_a_stream_of_arrivals_holds_a_step_for_two_fixed_times_at_most() -> None:
    window = regulars(*(0.050 + 0.002 * index for index in range(20)))
    window.step_ready(0, 0.050)
    now = 0.050
    while window.wait_seconds(1, FIXED, now) > 0:
        now += 0.002
    assert FIXED < now - 0.050 <= 2 * FIXED + LATENESS + 0.002


def test_an_ended_session_is_forgotten() -> None:
    window = regulars(0.050, 0.052)
    window.forget(1)
    window.step_ready(0, 0.050)
    assert window.wait_seconds(1, FIXED, 0.050) == 0
