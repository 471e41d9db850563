"""One scenario: a fresh client at work, faults at their steps, and every check afterwards."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chaos.client_run import ClientRun, client_runs
from chaos.cluster import Cluster, wait_until
from chaos.diagnosis import error_line, stacks
from chaos.faults import FaultInjector
from chaos.laptop import BACK_SECONDS
from chaos.leak_checks import LeakCheck, client_holdings, client_leaks, server_holdings
from chaos.report import Outcome
from chaos.schedule import LAPTOP_LIFE, STOPS_ALL, Fault, Phase, Scenario
from chaos.workload import PREFILL_CHUNK_TOKENS, GradientRun, Workload, make_workload
from petals import AutoDistributedModelForCausalLM
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import PetalsError
from petals.swarm.failover_config import FailoverConfig
from petals.testing.equality import assert_same_tokens

SCENARIO_SECONDS = 120.0
"""A call that has not ended by then hangs."""

_GRADIENT_TOLERANCE = 1e-5
"""Largest norm of the difference of two gradients, as a share of the expected one's norm."""

_VIEW_SECONDS = 45.0
"""Longest time until a new client's directory lists every server."""

_WAKE_SECONDS = 30.0
"""Longest time until a server that was stopped answers again, or one that leaves has gone."""

MAX_STALL_SECONDS = 10.0
"""Longest stall (s) that one fault explains: a silence of 3 s, and room for other work beside it.
A longer one is a wait that only a timeout has ended.
"""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The undisturbed run of a phase."""

    num_steps: int
    first_gap_seconds: float


class Runner:
    """Runs scenarios of one model on one cluster; ``scale`` multiplies the number of tokens."""

    def __init__(self, source: Path, cluster: Cluster, scale: int) -> None:
        self.cluster = cluster
        self.local: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32
        ).eval()
        self._leak_check = LeakCheck(cluster)
        self._source = source
        self._scale = scale
        self._undisturbed: dict[Phase, tuple[Workload, Baseline]] = {}

    def run(self, scenario: Scenario) -> Outcome:
        """Never raises for what the swarm did wrong: that is in the outcome."""
        outcome = Outcome(scenario, problems=self.cluster.remove_crashed())
        self.cluster.restore()
        before = client_holdings()
        try:
            with self.client() as model:
                if scenario.phase not in self._undisturbed:
                    self._run_undisturbed(model, scenario.phase, outcome)
                self._run_with_faults(model, scenario, outcome)
                outcome.problems += self._leak_check.leaks(manager_of(model))
        except (PetalsError, AssertionError, RuntimeError, OSError) as error:
            outcome.problems.append(error_line(error))
        outcome.problems += client_leaks(before)
        outcome.problems += self.cluster.remove_crashed()
        return outcome

    def leaks_after_leases(self) -> list[str]:
        """What servers still hold when every lease is over."""
        with self.client() as model:
            leaks = self._leak_check.leaks(manager_of(model), after_leases=True)
        return leaks + self.cluster.remove_crashed()

    @contextmanager
    def client(self) -> Iterator[PreTrainedModel]:
        """A new client that sees all servers."""
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(self._source),
            initial_peers=list(self.cluster.join_addresses),
            dtype=torch.float32,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
            show_route=False,
            failover=FailoverConfig(check_integrity=True),
        )
        manager = manager_of(model)
        try:
            self._await_all_seen(manager)
            self._leak_check.remember(manager)
            yield model
        finally:
            manager.shutdown()

    def _run_undisturbed(self, model: PreTrainedModel, phase: Phase, outcome: Outcome) -> None:
        """Note the steps of a phase and its time to the first token."""
        workload = make_workload(self.local, phase, self._scale)
        with client_runs(workload) as runs:
            for run in runs:
                run.start(model)
            _join(runs)
        outcome.problems += self._problems(workload, runs)
        timeline = runs[0].timeline
        baseline = Baseline(len(timeline.ended), timeline.gaps[0] if timeline.gaps else 0.0)
        self._undisturbed[phase] = workload, baseline

    def _run_with_faults(
        self, model: PreTrainedModel, scenario: Scenario, outcome: Outcome
    ) -> None:
        workload, baseline = self._undisturbed[scenario.phase]
        with client_runs(workload) as runs:
            first, *others = runs
            injector = FaultInjector(self.cluster, self._leak_check, first)
            try:
                first.start(model, injector.arm(scenario, baseline.num_steps))
                for run in others:
                    run.start(model)
                if scenario.phase is Phase.PREFILL:
                    injector.watch_prefill()
                _join(runs)
                injector.finish()
            finally:
                injector.undo()
        outcome.problems += self._problems(workload, runs)
        if any(fault.kind in LAPTOP_LIFE for fault in scenario.faults):
            outcome.problems += self._not_back(model, workload)
        outcome.landed = _landed(scenario, injector.injected_at, first.timeline.ended)
        outcome.stalls += [stall_seconds(run.timeline.gaps, baseline) for run in runs]
        outcome.problems += long_stalls(outcome.stalls, scenario.faults)
        if first.session is not None:
            outcome.notes += [
                f"repaired {repair.blocks} in {repair.stall_seconds:.2f} s: {repair.reason} "
                f"{repair.rounding}"
                for repair in first.session.trace.repairs
            ]
        self._await_survivors(manager_of(model))

    def _not_back(self, model: PreTrainedModel, workload: Workload) -> Iterator[str]:
        """What is wrong a minute after a fault: for this client, and for a new one."""
        deadline = time.monotonic() + BACK_SECONDS
        self._await_all_seen(manager_of(model), BACK_SECONDS)
        with self.client() as other:
            for client in (model, other):
                with client_runs(workload) as runs:
                    for run in runs:
                        run.start(client)
                    _join(runs)
                yield from self._problems(workload, runs)
        if time.monotonic() > deadline:
            yield f"not back within {BACK_SECONDS:.0f} s"

    def _await_all_seen(
        self, manager: RemoteSequenceManager, seconds: float = _VIEW_SECONDS
    ) -> None:
        alive = {server.peer_id: server for server in self.cluster.alive()}

        async def online() -> set[str]:
            view = await manager.access.view()
            await view.refresh()
            records = (await view.records()).records.values()
            return {r.peer_id for r in records if r.state.name == "ONLINE"}

        if not wait_until(lambda: alive.keys() <= manager.run(online()), seconds, pause=0.3):
            unseen = alive.keys() - manager.run(online())
            names = ", ".join(f"{alive[peer].blocks} …{peer[-6:]}" for peer in unseen)
            raise RuntimeError(f"not in the directory after {seconds:.0f} s: {names}")

    def _await_survivors(self, manager: RemoteSequenceManager) -> None:
        for server in self.cluster.alive():
            wait_until(
                lambda server=server: (
                    not server.process.is_running or server_holdings(manager, server) is not None
                ),
                _WAKE_SECONDS,
                pause=0.2,
            )

    def _problems(self, workload: Workload, runs: Sequence[ClientRun]) -> Iterator[str]:
        for number, (run, expected) in enumerate(zip(runs, workload.expected)):
            if run.is_alive:
                yield f"client {number} hangs:\n{stacks()}"
            elif run.error is not None:
                yield f"client {number}: {error_line(run.error)}"
            elif run.output is not None:
                for problem in self._differences(run, run.output, expected):
                    yield f"client {number}: {problem}"

    def _differences(self, run: ClientRun, output: Tensor, expected: Tensor) -> Iterator[str]:
        if output.shape != expected.shape:
            yield f"tokens lost or doubled: {list(output.shape)} for {list(expected.shape)}"
            return
        if isinstance(run.call, GradientRun):
            error = float((output - expected).norm() / expected.norm())
            if not error <= _GRADIENT_TOLERANCE:
                yield f"gradients differ by {error:.1e}"
            return
        if run.call.is_streamable and run.timeline.streamed != output[0].tolist():
            yield f"streamed {run.timeline.streamed}, returned {output[0].tolist()}"
        for row, (wanted, actual) in enumerate(zip(expected, output)):
            real = run.call.mask[row].bool() if len(run.call.mask) > row else None
            start = 0 if real is None else int(real.long().argmax())
            try:
                assert_same_tokens(self.local, wanted[start:], actual[start:])
            except AssertionError as error:
                yield f"row {row}: {error}"


def manager_of(model: Any) -> RemoteSequenceManager:
    """The owner of the model's connection."""
    manager: RemoteSequenceManager = model.remote_blocks.sequence_manager
    return manager


def stall_seconds(gaps: Sequence[float], baseline: Baseline) -> float:
    """Longest gap minus the median gap, or the delay of the first token, if that is more."""
    if not gaps:
        return 0.0
    first, later = gaps[0] - baseline.first_gap_seconds, gaps[1:]
    return max(0.0, first, max(later) - median(later) if later else 0.0)


def long_stalls(stalls: Sequence[float], faults: Sequence[Fault]) -> Iterator[str]:
    """The stalls (s) that the faults do not explain."""
    limit = sum(BACK_SECONDS if fault.kind in STOPS_ALL else MAX_STALL_SECONDS for fault in faults)
    for number, stall in enumerate(stalls):
        if stall > limit:
            yield f"client {number} waited {stall:.1f} s"


def _join(runs: Sequence[ClientRun]) -> None:
    deadline = time.monotonic() + SCENARIO_SECONDS
    for run in runs:
        run.join(deadline)


def _landed(scenario: Scenario, injected_at: Sequence[float], ended: Sequence[float]) -> bool:
    """Every fault came, before the last step (in a prefill: before the first) had ended."""
    if not ended or len(injected_at) < len(scenario.faults):
        return False
    last = ended[0] if scenario.phase is Phase.PREFILL else ended[-1]
    return all(at <= last for at in injected_at)
