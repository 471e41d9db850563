"""How long a sentence pauses when one of its servers dies, hangs or leaves.

    make bench RUN="failover.py --out benchmarks/results/failover_<where>.md"

SmolLM2 in three spans with two one-thread servers each, so that a spare holds every span; with root
and /dev/net/tun on hosts of a network laboratory with 5 ms between all (``--loopback``: without).
Every run decodes, loses one hop and is compared token for token with the local model.
"""

import argparse
import datetime
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from chaos.client_run import ClientRun
from chaos.cluster import CLIENT_HOST, Cluster, laboratory
from chaos.report import percentile
from chaos.runner import Runner
from chaos.swarms import open_runner
from chaos.workload import Generation, greedy
from machine import describe_machine
from netlab import NetLab
from petals.testing.equality import assert_same_tokens

RTT_MS = 5
ENV_LAB = "FAILOVER_LAB"
TOKENS_BEFORE = 8
TOKENS_AFTER = 16
FAULTS = ("kill", "pause", "leave")


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of run: what happens at which context length."""

    fault: str
    context: int


@dataclass(frozen=True, slots=True)
class Run:
    """``gap_seconds``: the longest time between two tokens after the fault; ``step_seconds`` the
    median one; ``prefill_seconds``: what the lost hop computed for the whole prompt."""

    case: Case
    hop: int
    gap_seconds: float
    step_seconds: float
    prefill_seconds: float
    problem: str = ""


def main() -> int:
    options = _options()
    if not options.loopback and ENV_LAB not in os.environ:
        with laboratory(RTT_MS) as lab:
            words, variables = [sys.executable, *sys.argv], {**os.environ, ENV_LAB: lab.name}
            return int(lab.run(CLIENT_HOST, words, env=variables).returncode)
    torch.set_num_threads(1)
    lab = None if options.loopback else NetLab.attach(os.environ[ENV_LAB])
    with tempfile.TemporaryDirectory(prefix="failover-") as folder, ExitStack() as stack:
        runner = open_runner("smollm2", stack, folder=Path(folder), lab=lab)
        runs = list(_all_runs(runner, options))
    text = report(runs, "loopback" if options.loopback else f"{RTT_MS} ms between all, 1 Gbit/s")
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 1 if any(run.problem for run in runs) else 0


def _all_runs(runner: Runner, options: argparse.Namespace) -> Iterator[Run]:
    """``repeats`` runs of every case, the hops in turn, the moment within a step at random."""
    cases = [Case(fault, context) for fault in options.faults for context in options.contexts]
    generator = random.Random(options.seed)
    answers = {case.context: _call(case.context) for case in cases}
    expected = {context: call.run(runner.local) for context, call in answers.items()}
    for repeat in range(options.repeats):
        for case in cases:
            run = _run(runner, case, repeat % 3, generator, (answers, expected))
            print(
                f"{case.fault} at hop {run.hop}, context {case.context}: "
                f"{run.gap_seconds:.2f} s (a step: {run.step_seconds:.3f} s, prefill of the span: "
                f"{run.prefill_seconds:.2f} s) {run.problem}",
                flush=True,
            )
            yield run


def _call(context: int) -> Generation:
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(5, 20_000, (1, context - TOKENS_BEFORE), generator=generator)
    return greedy(ids, TOKENS_BEFORE + TOKENS_AFTER, vocab_size=49_152)


def _run(
    runner: Runner,
    case: Case,
    hop: int,
    generator: random.Random,
    known: tuple[dict[int, Generation], dict[int, torch.Tensor]],
) -> Run:
    runner.cluster.restore()
    client_run = ClientRun(known[0][case.context])
    fault = _Fault(runner.cluster, client_run, case.fault, hop, generator.random())
    with runner.client() as model:
        client_run.start(model, fault.on_step)
        ended = client_run.join(time.monotonic() + 120)
        fault.undo()
        gaps = client_run.timeline.gaps
        if not ended or client_run.error is not None:
            problem = repr(client_run.error or "hangs")
        else:
            problem = _difference(runner, known[1][case.context], client_run.output)
        client_run.session.close()
    problem = "; ".join(filter(None, [problem, *runner.cluster.remove_crashed()]))
    return Run(
        case,
        hop,
        max(gaps[TOKENS_BEFORE:], default=float("nan")),
        client_run.timeline.step_seconds,
        fault.prefill_seconds,
        problem,
    )


class _Fault:
    """The fault, once, after TOKENS_BEFORE tokens and a share of a step."""

    def __init__(
        self, cluster: Cluster, run: ClientRun, fault: str, hop: int, delay: float
    ) -> None:
        self.prefill_seconds = 0.0
        self._cluster, self._run = cluster, run
        self._fault, self._hop, self._delay = fault, hop, delay
        self._paused: Any = None

    def on_step(self, num_done: int) -> None:
        if num_done != TOKENS_BEFORE:
            return
        hop = self._run.session.trace.hops[self._hop]
        victim = self._cluster.server(hop.peer_id)
        long = [step for step in hop.steps if step.num_tokens > 1]
        self.prefill_seconds = sum(step.compute_seconds for step in long)
        time.sleep(self._delay * 0.01)
        if self._fault == "kill":
            self._cluster.kill(victim)
        elif self._fault == "pause":
            victim.process.signal(signal.SIGSTOP)
            self._paused = victim
        else:
            self._cluster.ask_to_leave(victim)

    def undo(self) -> None:
        if self._paused is not None:
            self._paused.process.signal(signal.SIGCONT)


def _difference(runner: Runner, expected: torch.Tensor, actual: torch.Tensor | None) -> str:
    assert actual is not None
    try:
        assert_same_tokens(runner.local, expected[0], actual[0])
    except AssertionError as error:
        return f"tokens differ: {error}"
    return ""


def report(runs: list[Run], network: str) -> str:
    """The result file."""
    lines = [
        f"# Failover, {datetime.date.today()}",
        "",
        "SmolLM2-135M in f32, three spans, two one-thread servers each. Gap: the longest time "
        "between two tokens after the fault, in seconds, the step itself included.",
        "",
        "| fault | context | runs | other tokens | gap median | p95 | max | a step | bare prefill "
        "of the span | most allowed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(run.case for run in runs):
        group = [run for run in runs if run.case == case]
        gaps = [run.gap_seconds for run in group]
        step = median(run.step_seconds for run in group)
        prefill = median(run.prefill_seconds for run in group)
        lines.append(
            f"| {case.fault} | {case.context} | {len(group)} | "
            f"{sum(bool(run.problem) for run in group)} | {median(gaps):.2f} | "
            f"{percentile(gaps, 0.95):.2f} | {max(gaps):.2f} | {step:.3f} | {prefill:.2f} | "
            f"{_allowed(case, prefill, step)} |"
        )
    lines += [
        "",
        "Most allowed (the aims): kill 1.5 s at p95 at context 128, 1.5 s + 1.3 times the bare "
        "prefill at 1,000; pause 5 s (and the prefill alike); leave: one more step.",
        "",
        f"Network: {network}. {describe_machine()}",
        "",
    ]
    lines += [f"- {run.case} hop {run.hop}: {run.problem}" for run in runs if run.problem]
    return "\n".join(lines)


def _allowed(case: Case, prefill: float, step: float) -> str:
    if case.fault == "leave":
        return f"{2 * step:.2f}"
    base = {"kill": 1.5, "pause": 5.0}[case.fault]
    return f"{base + (1.3 * prefill if case.context > 128 else 0.0):.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
