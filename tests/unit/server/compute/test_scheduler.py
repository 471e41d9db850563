import pytest

from petals.server.compute.scheduler import BatchCost, Portion, Scheduler, WaitingWork
from petals.server.compute.step_plan import WorkKind
from petals.server.policies import SchedulerConfig

DECODE, PREFILL, FORWARD = WorkKind.DECODE, WorkKind.PREFILL, WorkKind.FORWARD


def scheduler(
    fixed_seconds: float = 0.02, seconds_per_token: float = 0.001, **changes: float
) -> Scheduler:
    return Scheduler(SchedulerConfig(**changes), BatchCost(fixed_seconds, seconds_per_token))


def taken(batch: tuple[Portion, ...]) -> dict[int, int]:
    return {portion.key: portion.num_tokens for portion in batch}


def test_nothing_waits_nothing_runs() -> None:
    assert scheduler().next_batch() == ()


def test_all_decodes_run_together() -> None:
    plan = scheduler()
    for key in range(20):
        plan.add(WaitingWork(key, f"peer {key % 3}", DECODE, 1))
    assert taken(plan.next_batch()) == dict.fromkeys(range(20), 1)
    assert len(plan) == 0 and plan.waiting_tokens == 0


def test_a_decode_beside_a_long_prompt_never_waits_longer_than_the_budget() -> None:
    cost = BatchCost(0.02, 0.001)
    plan = Scheduler(SchedulerConfig(latency_budget_seconds=0.1), cost)
    plan.add(WaitingWork(0, "reader", PREFILL, 5000))
    done = 0
    for key in range(1, 400):
        plan.add(WaitingWork(key, "writer", DECODE, 1))
        batch = plan.next_batch()
        num_tokens = sum(portion.num_tokens for portion in batch)
        assert taken(batch)[key] == 1
        assert cost.seconds(num_tokens) <= 0.1
        done += num_tokens - 1
        plan.observe(num_tokens, cost.seconds(num_tokens))
        if not len(plan):
            break
    # The prompt moves on at the speed that the budget leaves it: 79 tokens beside each decode.
    assert done == 5000
    assert key == pytest.approx(5000 / 79, abs=1)


def test_between_two_tokens_of_a_writer_the_prompt_still_runs_in_short_batches() -> None:
    plan = scheduler(latency_budget_seconds=0.1, idle_budget_seconds=0.5)
    plan.add(WaitingWork(0, "reader", PREFILL, 100_000))
    assert taken(plan.next_batch()) == {0: 480}
    plan.add(WaitingWork(1, "writer", DECODE, 1))
    plan.next_batch()
    assert taken(plan.next_batch()) == {0: 80}
    for _ in range(20):
        last = plan.next_batch()
    assert taken(last) == {0: 480}


def test_decodes_that_need_longer_than_the_budget_may_be_doubled() -> None:
    plan = scheduler(fixed_seconds=0.05, seconds_per_token=0.002, latency_budget_seconds=0.1)
    for key in range(64):
        plan.add(WaitingWork(key, "writers", DECODE, 1))
    plan.add(WaitingWork(99, "reader", PREFILL, 1000))
    # 64 decodes take 0.178 s; a batch of twice that holds 153 tokens.
    assert taken(plan.next_batch())[99] == 153 - 64


def test_a_slow_machine_still_reads_prompts() -> None:
    plan = scheduler(fixed_seconds=1.0, seconds_per_token=1.0, min_chunk_tokens=16)
    plan.add(WaitingWork(0, "reader", PREFILL, 40))
    assert [taken(plan.next_batch()) for _ in range(3)] == [{0: 16}, {0: 16}, {0: 8}]


def test_batches_are_bounded() -> None:
    plan = scheduler(seconds_per_token=1e-9, max_batch_tokens=100)
    plan.add(WaitingWork(0, "reader", PREFILL, 250))
    for key in range(1, 31):
        plan.add(WaitingWork(key, "writer", DECODE, 4))
    sizes = []
    while len(plan):
        sizes.append(sum(portion.num_tokens for portion in plan.next_batch()))
    assert max(sizes) == 100
    assert sum(sizes) == 250 + 30 * 4


def test_peers_share_whatever_the_length_of_their_prompts() -> None:
    plan = scheduler(max_batch_tokens=100, seconds_per_token=1e-6)
    for key in range(4):
        plan.add(WaitingWork(key, "greedy", PREFILL, 1000))
    plan.add(WaitingWork(10, "modest", PREFILL, 300))
    served = {"greedy": 0, "modest": 0}
    while served["modest"] < 300:
        for key, num_tokens in taken(plan.next_batch()).items():
            served["modest" if key == 10 else "greedy"] += num_tokens
    assert served["greedy"] <= 400


def test_a_newcomer_does_not_jump_ahead_for_ever_and_does_not_pay_for_the_past() -> None:
    plan = scheduler(max_batch_tokens=100, seconds_per_token=1e-6)
    plan.add(WaitingWork(0, "old", PREFILL, 10_000))
    for _ in range(50):
        plan.next_batch()
    plan.add(WaitingWork(1, "new", PREFILL, 10_000))
    shares = {0: 0, 1: 0}
    for _ in range(20):
        for key, num_tokens in taken(plan.next_batch()).items():
            shares[key] += num_tokens
    assert shares == {0: 1000, 1: 1000}


def test_prompts_of_one_peer_take_turns() -> None:
    plan = scheduler(max_batch_tokens=100, seconds_per_token=1e-6)
    plan.add(WaitingWork(0, "peer", PREFILL, 300))
    plan.add(WaitingWork(1, "peer", PREFILL, 300))
    assert [list(taken(plan.next_batch())) for _ in range(4)] == [[0], [1], [0], [1]]


def test_passes_run_below_prompts_and_do_not_starve() -> None:
    plan = scheduler(max_batch_tokens=10, seconds_per_token=1e-6, forward_every=8)
    plan.add(WaitingWork(0, "trainer", FORWARD, 100))
    plan.add(WaitingWork(1, "reader", PREFILL, 1000))
    order = []
    for _ in range(18):
        batch = taken(plan.next_batch())
        order += list(batch)
        if 0 in batch:
            plan.advance(0, batch[0], 0.01)
    assert order == ([1] * 8 + [0]) * 2
    assert plan.waiting_tokens == 1000 - 160 + 80


def test_a_unit_of_a_pass_runs_alone_and_a_decode_waits_no_longer_than_the_budget() -> None:
    plan = scheduler(0.0, 0.001, latency_budget_seconds=0.1, idle_budget_seconds=0.5)
    plan.add(WaitingWork(0, "trainer", FORWARD, 5000))
    assert taken(plan.next_batch()) == {0: 500}
    plan.add(WaitingWork(1, "writer", DECODE, 1))
    assert taken(plan.next_batch()) == {1: 1}
    assert taken(plan.next_batch()) == {0: 100}


def test_units_learn_their_own_price() -> None:
    plan = scheduler(0.0, 0.001)
    plan.add(WaitingWork(0, "trainer", FORWARD, 100_000))
    for _ in range(50):
        (portion,) = plan.next_batch()
        plan.advance(0, portion.num_tokens, 0.002 * portion.num_tokens)
    assert plan.next_batch()[0].num_tokens == pytest.approx(250, abs=3)
    plan.add(WaitingWork(1, "reader", PREFILL, 1000))
    assert taken(plan.next_batch()) == {1: 500}


def test_passes_of_one_peer_do_not_take_turns_but_peers_do() -> None:
    plan = scheduler(max_batch_tokens=100, seconds_per_token=1e-6)
    plan.add(WaitingWork(0, "a", FORWARD, 200))
    plan.add(WaitingWork(1, "a", FORWARD, 200))
    plan.add(WaitingWork(2, "b", FORWARD, 200))
    order = []
    while len(plan):
        (portion,) = plan.next_batch()
        order.append(portion.key)
        plan.advance(portion.key, 100, 0.01)
        if order.count(portion.key) == 2:
            plan.discard(portion.key)
    assert order == [0, 2, 0, 2, 1, 1]


def test_work_without_tokens_runs_too() -> None:
    plan = scheduler()
    plan.add(WaitingWork(0, "peer", DECODE, 0))
    assert plan.next_batch() == (Portion(0, 0),)
    assert len(plan) == 0


def test_discarded_work_never_runs() -> None:
    plan = scheduler()
    plan.add(WaitingWork(0, "peer", PREFILL, 10))
    plan.add(WaitingWork(1, "peer", DECODE, 1))
    plan.discard(0)
    plan.discard(7)
    assert taken(plan.next_batch()) == {1: 1}


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
