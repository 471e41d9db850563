"""The compute thread with a fake span: order, isolation of failures, results, the end."""

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
from petals.server.compute.jobs import ExclusiveJob, Job
from petals.server.compute.kv_pool import KVPool
from petals.server.compute.scheduler import Portion, Scheduler
from petals.server.compute.step_job import StepJob, StepPlan
from petals.server.policies import SchedulerConfig
from petals.types import BlockSpan

SPAN = BlockSpan(0, 1)
LAYOUT = KVLayout(span=SPAN, blocks=(BlockLayout(key_shape=(1, 1), value_shape=(1, 1)),))


class Doubler:
    """Doubles states; fails for negative ones. ``gate`` holds every batch until it is set."""

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


class PartedJob(ExclusiveJob[str]):
    """A job that runs alone in ``left`` parts. ``breaks``: the part or method that fails."""

    owner, cost_tokens, is_done = "trainer", 1000, False

    def __init__(self, runner: Doubler, left: int, breaks: int | str = -1) -> None:
        self.runner, self.left, self.breaks = runner, left, breaks
        self.num_aborts = 0

    def prepare(self, device: DeviceContext) -> None:
        assert device.runner is self.runner
        if self.breaks == "prepare":
            raise ZeroDivisionError("preparation")

    def run(self, budget_tokens: int) -> int:
        self.runner.gate.wait(10)
        self.runner.log.append("part")
        self.left -= 1
        if self.left == self.breaks:
            raise ZeroDivisionError("a part")
        self.is_done = self.left == 0
        return budget_tokens

    def abort(self) -> None:
        self.num_aborts += 1

    def result(self) -> str:
        if self.breaks == "result":
            raise ZeroDivisionError("the result")
        return "done"


class Rig:
    """An executor with one pool; ``step`` makes a job of ``counts`` tokens at the rows' ends."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.runner = Doubler()
        self.pool = KVPool.for_tokens(LAYOUT, 4096)
        self.scheduler = Scheduler(config)
        self.failed = asyncio.Event()
        self.executor = Executor(self.scheduler, self.failed.set)
        device = DeviceContext(self.runner, torch.device("cpu"), torch.float32, ActivationBudget(0))
        self.executor.attach(device, self.pool.check_integrity)

    def step(self, hidden: torch.Tensor, counts: tuple[int, ...] | None = None) -> StepJob:
        counts = counts or (len(hidden),)
        kv = self.pool.reserve(len(counts), 64, SPAN)
        plan = StepPlan((0,) * len(counts), counts)
        return StepJob(kv, SPAN, plan, hidden, torch.float32, "peer")

    async def start(self, *jobs: Job) -> list["asyncio.Task"]:
        """Hand jobs in; they reach the compute thread in this order."""
        tasks = [asyncio.create_task(self.executor.run(job)) for job in jobs]
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def rig() -> Rig:
    made = Rig(SchedulerConfig(max_batch_tokens=16))
    async with made.executor:
        yield made


async def test_a_result_comes_with_its_times(rig: Rig) -> None:
    outcome = await rig.executor.run(rig.step(torch.ones(3, 2)))
    assert torch.equal(outcome.value, torch.full((3, 2), 2.0))
    assert outcome.batch_tokens == 3
    assert outcome.queue_seconds >= 0 and outcome.compute_seconds > 0
    assert rig.executor.step_seconds > 0
    assert rig.runner.threads == {"petals-compute"}


async def test_a_long_step_is_cut_and_joined(rig: Rig) -> None:
    hidden = torch.arange(40.0)[:, None]
    outcome = await rig.executor.run(rig.step(hidden, (25, 15)))
    assert torch.equal(outcome.value, 2 * hidden)
    assert rig.runner.batches == [[16], [9, 7], [8]]


async def test_steps_that_wait_together_run_together(rig: Rig) -> None:
    rig.runner.gate.clear()
    tasks = await rig.start(rig.step(torch.ones(1, 2)))
    tasks += await rig.start(*(rig.step(torch.ones(1, 2)) for _ in range(3)))
    rig.runner.gate.set()
    await asyncio.gather(*tasks)
    assert len(rig.runner.batches) <= 2
    assert sum(len(batch) for batch in rig.runner.batches) == 4


async def test_a_failing_step_fails_alone(rig: Rig) -> None:
    rig.runner.gate.clear()
    inputs = [torch.ones(1, 2), torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2)]
    jobs = [rig.step(hidden) for hidden in inputs]
    tasks = [*await rig.start(jobs[0]), *await rig.start(*jobs[1:])]
    rig.runner.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, PeerFailed) for result in results] == [False, False, True, False]
    assert [job.kv.rows[0].length for job in jobs] == [1, 1, 0, 1]


async def test_a_step_waits_for_one_part_of_a_pass(rig: Rig) -> None:
    rig.runner.gate.clear()
    tasks = await rig.start(PartedJob(rig.runner, 4))
    tasks += await rig.start(rig.step(torch.ones(1, 2)))
    rig.runner.gate.set()
    passed, step = await asyncio.gather(*tasks)
    assert torch.equal(step.value, torch.full((1, 2), 2.0))
    log = rig.runner.log
    # The step may have come before the first part, never after the second.
    assert log.index("step") <= 2 and log.count("part") == 4
    assert passed.value == "done"
    assert passed.queue_seconds >= 0 and passed.compute_seconds > 0
    assert rig.executor.waiting_tokens == 0


@pytest.mark.parametrize("breaks", ["prepare", 2, "result"])
async def test_a_pass_that_fails_is_aborted_and_no_other(rig: Rig, breaks: int | str) -> None:
    broken, other = PartedJob(rig.runner, 4, breaks), PartedJob(rig.runner, 3)
    tasks = await rig.start(broken, other)
    failed, passed = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, PeerFailed) and "ZeroDivisionError" in failed.message
    assert passed.value == "done"
    assert (broken.num_aborts, other.num_aborts) == (1, 0)
    assert rig.executor.waiting_tokens == 0


async def test_a_job_whose_caller_is_cancelled_is_aborted(rig: Rig) -> None:
    rig.runner.gate.clear()
    step, passing = rig.step(torch.ones(40, 1)), PartedJob(rig.runner, 100)
    for task in await rig.start(step, passing):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    rig.runner.gate.set()
    assert await rig.executor.call(lambda: step.kv.rows[0].length) == 0
    assert passing.num_aborts == 1 and passing.left >= 99
    assert rig.executor.waiting_tokens == 0
    assert len(rig.runner.batches) <= 1


async def test_states_must_be_finite_and_no_row_is_touched(rig: Rig) -> None:
    job = rig.step(torch.tensor([[float("nan")]]))
    with pytest.raises(BadInput):
        await rig.executor.run(job)
    assert not job.has_begun
    assert rig.runner.batches == []


async def test_calls_run_on_the_thread_and_raise_at_the_caller(rig: Rig) -> None:
    assert await rig.executor.call(lambda: threading.current_thread().name) == "petals-compute"
    assert await rig.executor.call_on_device(lambda device: device.runner) is rig.runner
    with pytest.raises(ZeroDivisionError):
        await rig.executor.call(lambda: 1 // 0)
    rig.executor.post(lambda: 1 // 0)
    assert await rig.executor.call(lambda: 7) == 7


async def test_the_end_fails_the_jobs_that_wait() -> None:
    rig = Rig(SchedulerConfig(max_batch_tokens=16))
    async with rig.executor:
        rig.runner.gate.clear()
        tasks = await rig.start(rig.step(torch.ones(40, 1)))
        threading.Timer(0.05, rig.runner.gate.set).start()
    for waiting in (
        *tasks,
        rig.executor.call(lambda: 1),
        rig.executor.run(rig.step(torch.ones(1, 1))),
    ):
        with pytest.raises(SessionClosed):
            await waiting
    assert not rig.failed.is_set()


async def test_jobs_need_blocks_and_do_not_outlive_them(rig: Rig) -> None:
    rig.runner.gate.clear()
    passing = PartedJob(rig.runner, 100)
    (task,) = await rig.start(passing)
    detaching = asyncio.create_task(rig.executor.call(rig.executor.detach))
    await asyncio.sleep(0)
    rig.runner.gate.set()
    await detaching
    for waiting in (
        task,
        rig.executor.run(rig.step(torch.ones(1, 1))),
        rig.executor.call_on_device(lambda device: device),
    ):
        with pytest.raises(PeerFailed, match="no blocks"):
            await waiting
    assert passing.num_aborts == 1


async def test_an_output_does_not_keep_its_batch_in_memory(rig: Rig) -> None:
    outcome = await rig.executor.run(rig.step(torch.ones(2, 8), (1, 1)))
    assert outcome.value.untyped_storage().nbytes() == 2 * 8 * 4


class TestFailure:
    """An error outside of every job ends the thread: no caller waits for ever, and it is logged."""

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("error", [AttributeError("a bug"), SystemExit(3)])
    async def test_every_caller_is_told(
        self,
        rig: Rig,
        error: BaseException,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def broken(batch: Sequence[Portion], seconds: float) -> None:
            raise error

        monkeypatch.setattr(rig.scheduler, "ran", broken)
        rig.runner.gate.clear()
        tasks = await rig.start(rig.step(torch.ones(1, 1)), PartedJob(rig.runner, 2))
        tasks.append(asyncio.create_task(rig.executor.call(lambda: 1)))
        await asyncio.sleep(0)
        rig.runner.gate.set()
        await rig.failed.wait()
        late = rig.executor.run(rig.step(torch.ones(1, 1))), rig.executor.call(lambda: 1)
        for waiting in (*tasks[:2], *late):
            with pytest.raises(PeerFailed, match="compute thread has failed"):
                await waiting
        # The call may have come before the first batch.
        assert isinstance(tasks[2].exception(), PeerFailed | None)
        rig.executor.post(lambda: 1)
        (record,) = [r for r in caplog.records if r.levelname == "CRITICAL"]
        assert record.exc_info[1] is error

    async def test_accounts_that_do_not_add_up_are_an_error(self, rig: Rig) -> None:
        await rig.executor.run(rig.step(torch.ones(1, 1)))

        def check() -> None:
            raise AssertionError("reservations do not add up")

        await rig.executor.call_on_device(lambda device: rig.executor.attach(device, check))
        await rig.failed.wait()
        with pytest.raises(PeerFailed):
            await rig.executor.call(lambda: None)
