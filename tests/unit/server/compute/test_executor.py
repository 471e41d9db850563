"""The compute thread with a fake span: order, isolation, handing over, ending."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from petals.errors import BadInput, PeerFailed, SessionClosed
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import BlockLayout, KVLayout
from petals.server.compute.activation_budget import ActivationBudget
from petals.server.compute.device import DeviceContext
from petals.server.compute.executor import Executor
from petals.server.compute.jobs import Work
from petals.server.compute.kv_pool import KVPool
from petals.server.compute.scheduler import Scheduler
from petals.server.compute.step_plan import StepPlan, WorkKind
from petals.server.policies import SchedulerConfig
from petals.types import BlockSpan

SPAN = BlockSpan(0, 1)
LAYOUT = KVLayout(span=SPAN, blocks=(BlockLayout(key_shape=(1, 1), value_shape=(1, 1)),))


class Doubler:
    """Doubles; negative numbers break it. ``gate`` holds every batch until it is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()
        self.log: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        self.log.append("step")
        self.batches.append([len(segment.hidden) for segment in segments])
        for segment in segments:
            if (segment.hidden < 0).any():
                raise ZeroDivisionError("negative")
            segment.row.commit(segment.end)
        return [2 * segment.hidden for segment in segments]


class Rig:
    """An executor with one pool; ``work`` makes a step of ``counts`` tokens at the rows' ends."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.runner = Doubler()
        self.pool = KVPool.for_tokens(LAYOUT, 4096)
        self.executor = Executor(Scheduler(config))
        place = DeviceContext(self.runner, torch.device("cpu"), torch.float32, ActivationBudget(0))
        self.executor.attach(place)

    def work(self, hidden: torch.Tensor, counts: tuple[int, ...] | None = None) -> Work:
        counts = counts or (len(hidden),)
        kv = self.pool.reserve(len(counts), 64, SPAN)
        plan = StepPlan((0,) * len(counts), counts)
        return Work(kv, SPAN, plan, hidden, torch.float32, "peer", plan.kind)


@pytest.fixture
async def rig() -> Rig:
    made = Rig(SchedulerConfig(max_batch_tokens=16))
    async with made.executor:
        yield made


async def test_work_comes_back_with_its_times(rig: Rig) -> None:
    outcome = await rig.executor.run(rig.work(torch.ones(3, 2)))
    assert torch.equal(outcome.hidden, torch.full((3, 2), 2.0))
    assert outcome.batch_tokens == 3
    assert outcome.queue_seconds >= 0 and outcome.compute_seconds > 0
    assert rig.executor.step_seconds > 0
    assert rig.runner.threads == {"petals-compute"}


async def test_long_work_is_cut_and_put_together_again(rig: Rig) -> None:
    hidden = torch.arange(40.0)[:, None]
    outcome = await rig.executor.run(rig.work(hidden, (25, 15)))
    assert torch.equal(outcome.hidden, 2 * hidden)
    assert rig.runner.batches == [[16], [9, 7], [8]]


async def test_what_waits_together_runs_together(rig: Rig) -> None:
    rig.runner.gate.clear()
    first = asyncio.create_task(rig.executor.run(rig.work(torch.ones(1, 2))))
    await asyncio.sleep(0)
    rest = [asyncio.create_task(rig.executor.run(rig.work(torch.ones(1, 2)))) for _ in range(3)]
    await asyncio.sleep(0)
    rig.runner.gate.set()
    await asyncio.gather(first, *rest)
    assert len(rig.runner.batches) <= 2
    assert sum(len(batch) for batch in rig.runner.batches) == 4


async def test_one_failure_is_one_failure(rig: Rig) -> None:
    rig.runner.gate.clear()
    holder = asyncio.create_task(rig.executor.run(rig.work(torch.ones(1, 2))))
    inputs = [torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2)]
    works = [rig.work(hidden) for hidden in inputs]
    tasks = [asyncio.create_task(rig.executor.run(work)) for work in works]
    await asyncio.sleep(0)
    rig.runner.gate.set()
    results = await asyncio.gather(holder, *tasks, return_exceptions=True)
    assert [isinstance(result, PeerFailed) for result in results] == [False, False, True, False]
    assert [work.kv.rows[0].length for work in works] == [1, 0, 1]
    rig.pool.check_integrity()


class Units:
    """A pass of ``left`` units; it notes in ``log`` when they run. The unit ``breaks`` fails."""

    owner, cost_tokens = "trainer", 1000

    def __init__(self, rig: Rig, left: int, breaks: int = -1) -> None:
        self.rig, self.left, self.breaks = rig, left, breaks
        self.log: list[str] = rig.runner.log
        self.is_done = self.is_given_up = False

    def begin(self, place: DeviceContext) -> None:
        self.log.append("begin")

    def unit(self, room: int) -> int:
        self.rig.runner.gate.wait(10)
        self.log.append("unit")
        self.left -= 1
        if self.left == self.breaks:
            raise ZeroDivisionError("a unit")
        self.is_done = self.left == 0
        return room

    def give_up(self) -> None:
        self.is_given_up = True


async def test_a_step_waits_for_one_unit_of_a_pass(rig: Rig) -> None:
    rig.runner.gate.clear()
    passing = asyncio.create_task(rig.executor.run_pass(Units(rig, 4)))
    await asyncio.sleep(0)
    step = asyncio.create_task(rig.executor.run(rig.work(torch.ones(1, 2))))
    await asyncio.sleep(0)
    rig.runner.gate.set()
    times, outcome = await asyncio.gather(passing, step)
    assert torch.equal(outcome.hidden, torch.full((1, 2), 2.0))
    log = rig.runner.log
    # The step may have come before the first unit, never behind the second.
    assert log.index("step") <= 2 and log.count("unit") == 4
    assert times.queue_seconds >= 0 and times.compute_seconds > 0
    assert rig.executor.waiting_tokens == 0


async def test_a_pass_that_fails_is_given_up_and_takes_nobody_with_it(rig: Rig) -> None:
    broken, other = Units(rig, 4, breaks=2), Units(rig, 3)
    results = await asyncio.gather(
        rig.executor.run_pass(broken), rig.executor.run_pass(other), return_exceptions=True
    )
    assert isinstance(results[0], PeerFailed) and broken.is_given_up
    assert other.is_done and not other.is_given_up


async def test_a_pass_whose_caller_has_gone_is_given_up(rig: Rig) -> None:
    rig.runner.gate.clear()
    work = Units(rig, 100)
    task = asyncio.create_task(rig.executor.run_pass(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    rig.runner.gate.set()
    await rig.executor.call(lambda: None)
    assert work.is_given_up and work.left >= 99
    assert rig.executor.waiting_tokens == 0


async def test_states_must_be_finite_and_nothing_is_touched(rig: Rig) -> None:
    work = rig.work(torch.tensor([[float("nan")]]))
    with pytest.raises(BadInput):
        await rig.executor.run(work)
    assert not work.begun
    assert rig.runner.batches == []


async def test_calls_run_on_the_thread_and_raise_here(rig: Rig) -> None:
    assert await rig.executor.call(lambda: threading.current_thread().name) == "petals-compute"
    with pytest.raises(ZeroDivisionError):
        await rig.executor.call(lambda: 1 // 0)
    rig.executor.post(lambda: 1 // 0)
    assert await rig.executor.call(lambda: 7) == 7


async def test_work_given_up_leaves_its_rows_at_rest(rig: Rig) -> None:
    rig.runner.gate.clear()
    work = rig.work(torch.ones(40, 1))
    task = asyncio.create_task(rig.executor.run(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    rig.runner.gate.set()
    assert await rig.executor.call(lambda: work.kv.rows[0].length) == 0
    assert rig.executor.waiting_tokens == 0
    assert len(rig.runner.batches) <= 1


async def test_the_end_fails_what_waits() -> None:
    rig = Rig(SchedulerConfig(max_batch_tokens=16))
    async with rig.executor:
        rig.runner.gate.clear()
        task = asyncio.create_task(rig.executor.run(rig.work(torch.ones(40, 1))))
        await asyncio.sleep(0)
        threading.Timer(0.05, rig.runner.gate.set).start()
    with pytest.raises(SessionClosed):
        await task
    with pytest.raises(SessionClosed):
        await rig.executor.call(lambda: 1)


async def test_without_blocks_work_is_refused() -> None:
    rig = Rig(SchedulerConfig())
    async with Executor(Scheduler(SchedulerConfig())) as executor:
        with pytest.raises(PeerFailed):
            await executor.run(rig.work(torch.ones(1, 1)))


async def test_answers_do_not_keep_the_batch_in_memory(rig: Rig) -> None:
    outcome = await rig.executor.run(rig.work(torch.ones(2, 8), (1, 1)))
    assert outcome.hidden.untyped_storage().nbytes() == 2 * 8 * 4
    assert WorkKind.DECODE < WorkKind.PREFILL < WorkKind.FORWARD
