"""The long run: `make chaos SEED=1 MINUTES=5`, `ONLY=17` to repeat one scenario.

With root and /dev/net/tun everything can run in a network laboratory, where links fail, too.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from chaos.cluster import CLIENT_HOST, laboratory
from chaos.report import failure_list, stall_table
from chaos.runner import Outcome, Runner
from chaos.schedule import ON_PROCESSES, FaultKind, Phase, Scenario, ScenarioSpace, draw
from chaos.swarms import SPANS, open_runner
from netlab import NetLab

MAX_SCENARIOS = 100_000
WEIGHTS = {"bloom": 4, "smollm2": 1}
"""Shares of the time, and of the draws, that each model gets."""

RTT_MS = 5
ENV_LAB = "CHAOS_LAB"
"""Name of the laboratory, for the child that runs on its client's host."""


def main() -> int:
    options = _options()
    if options.network and ENV_LAB not in os.environ:
        return _inside_a_laboratory()
    torch.set_num_threads(1)
    outcomes = _run_all(options)
    table = f"{stall_table(outcomes)}\n\n## Failures\n\n{failure_list(outcomes)}\n"
    print(table)
    if options.write:
        _write(options, outcomes, table)
    failed = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes)} runs, {len(failed)} failed (seed {options.seed})")
    return 1 if failed else 0


def _run_all(options: argparse.Namespace) -> list[Outcome]:
    models = [(name, WEIGHTS[name]) for name in options.models]
    lab = NetLab.attach(os.environ[ENV_LAB]) if options.network else None
    kinds = tuple(FaultKind) if lab is not None else ON_PROCESSES
    space = ScenarioSpace(
        models=models,
        num_hops=3,
        kinds=tuple(k for k in kinds if not options.faults or k.name in options.faults),
        phases=tuple(p for p in Phase if not options.phases or p.name in options.phases),
    )
    numbers = range(options.start, MAX_SCENARIOS) if options.only is None else [options.only]
    ends_at = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    # One model after the other: two swarms would not fit on a small machine.
    scenarios = (draw(space, options.seed, number) for number in numbers)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for index, (name, weight) in enumerate(models):
            shares = sum(w for _, w in models[index:])
            until = time.monotonic() + (ends_at - time.monotonic()) * weight / shares
            with ExitStack() as stack:
                print(f"starting the swarm of {name}", flush=True)
                runner = open_runner(name, stack, folder=Path(folder), lab=lab)
                for scenario in scenarios:
                    outcomes.append(_run(runner, replace(scenario, model=name)))
                    if time.monotonic() > until:
                        break
                _check_leases(runner, outcomes)
            if options.only is not None:
                break
    return outcomes


def _run(runner: Runner, scenario: Scenario) -> Outcome:
    began = time.monotonic()
    print(scenario, flush=True)
    outcome = runner.run(scenario)
    stall = max(outcome.stalls, default=0.0)
    landed = "" if outcome.landed else ", came too late"
    verdict = "FAILED" if outcome.problems else "ok"
    print(f"  {verdict}, stall {stall:.2f} s, {time.monotonic() - began:.1f} s{landed}")
    for note in outcome.notes:
        print(f"  {note}")
    for problem in outcome.problems:
        print(f"  PROBLEM {problem}")
    if outcome.problems:
        number, model = scenario.number, scenario.model
        print(f"  repeat: make chaos SEED={scenario.seed} ONLY={number} MODELS={model}")
    sys.stdout.flush()
    return outcome


def _check_leases(runner: Runner, outcomes: list[Outcome]) -> None:
    leaks = [f"after all leases: {leak}" for leak in runner.leaks_after_leases()]
    for leak in leaks:
        print(f"PROBLEM {leak}", flush=True)
    if leaks and outcomes:
        outcomes[-1].problems += leaks


def _inside_a_laboratory() -> int:
    """Run this program again on the client's host of a new laboratory."""
    with laboratory(RTT_MS) as lab:
        words = [sys.executable, "-m", "chaos", *sys.argv[1:]]
        return lab.run(CLIENT_HOST, words, env={**os.environ, ENV_LAB: lab.name}).returncode


def _write(options: argparse.Namespace, outcomes: list[Outcome], table: str) -> None:
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    today = datetime.date.today().isoformat()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    network = f"laboratory, {RTT_MS} ms between all" if options.network else "loopback"
    late = sum(not outcome.landed for outcome in outcomes)
    head = (
        f"# Chaos tests, {machine}, {today}\n\n"
        f"Commit {commit}, seed {options.seed}, {len(outcomes)} runs, network: {network}.\n"
        f"Stall: the longest gap between two tokens minus the median gap (or the delay of the "
        f"first token), of the client that was hit hardest. {late} faults came after the last "
        f"token and count only as runs.\n\n"
    )
    path = Path(options.write) / f"chaos_{machine}_{today}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + table, encoding="utf-8")
    print(f"written: {path}")


def _options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.replace(",", " ").split()

    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--start", type=int, default=0, help="number of the first scenario")
    parser.add_argument("--only", type=int, help="number of the only scenario")
    parser.add_argument("--models", type=words, default=list(SPANS))
    parser.add_argument("--faults", type=words, default=[], help="names of FaultKind, else all")
    parser.add_argument("--phases", type=words, default=[], help="names of Phase, else all")
    parser.add_argument("--network", action="store_true", help="in a network laboratory (root)")
    parser.add_argument("--write", help="folder for the table of stalls")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
