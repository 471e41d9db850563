"""The long run: `make chaos SEED=1 MINUTES=5` or `RUNS=200`; `ONLY=17` repeats one scenario.

With root and /dev/net/tun everything can run in a network laboratory, where links fail, too.
"""

import argparse
import datetime
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from chaos.cluster import CLIENT_HOST, laboratory
from chaos.laptop import SERVER_OPTIONS
from chaos.moving_host import ENV_OWN_NETWORK, MovingHost, in_own_network
from chaos.report import Outcome, failure_list, stall_table
from chaos.runner import Runner
from chaos.schedule import (
    LAPTOP_LIFE,
    ON_PROCESSES,
    ON_PROCESSES_AND_NETWORK,
    FaultKind,
    Phase,
    Scenario,
    ScenarioSpace,
    draw,
)
from chaos.swarms import NUM_HOPS, SPANS, open_runner
from netlab import NetLab

WEIGHTS = {"bloom": 4, "smollm2": 1}
"""Shares of the runs, or of the time, that each model gets."""

_ROUNDING = 1e-9
"""Sums of shares may be this much too large."""

RTT_MS = 5
ENV_LAB = "CHAOS_LAB"
"""Name of the laboratory, for the child that runs on its client's host."""


def main() -> int:
    options = _options()
    if options.network and ENV_LAB not in os.environ:
        # Run this program again on the client's host of a new laboratory.
        with laboratory(RTT_MS) as lab:
            words = [sys.executable, "-m", "chaos", *sys.argv[1:]]
            return lab.run(CLIENT_HOST, words, env={**os.environ, ENV_LAB: lab.name}).returncode
    moves = options.laptop and FaultKind.ADDRESS in _laptop_kinds(options)
    if moves and ENV_OWN_NETWORK not in os.environ:
        return in_own_network([sys.executable, "-m", "chaos", *sys.argv[1:]])
    torch.set_num_threads(1)
    began = time.monotonic()
    outcomes = _run_all(options)
    table = f"{stall_table(outcomes)}\n\n## Failures\n\n{failure_list(outcomes)}\n"
    print(table)
    if options.write:
        _write(options, outcomes, table)
    num_failed = sum(bool(outcome.problems) for outcome in outcomes)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(outcomes)} runs in {minutes:.1f} minutes, {num_failed} failed (seed {options.seed})"
    )
    return 1 if num_failed else 0


def _run_all(options: argparse.Namespace) -> list[Outcome]:
    lab = NetLab.attach(os.environ[ENV_LAB]) if options.network else None
    kinds = ON_PROCESSES if lab is None else ON_PROCESSES_AND_NETWORK
    if options.laptop:
        kinds = _laptop_kinds(options)
    numbers = itertools.count(options.start)
    began, share, outcomes = time.monotonic(), 0.0, []

    def progress() -> float:
        """From 0 to 1 at the end of the run."""
        if options.runs:
            return len(outcomes) / options.runs
        return (time.monotonic() - began) / (60 * options.minutes)

    # One model after the other: two swarms would not fit on a small machine.
    for name in options.models:
        share += WEIGHTS[name] / sum(WEIGHTS[model] for model in options.models)
        if progress() >= share - _ROUNDING:
            continue
        space = ScenarioSpace(
            model=name,
            num_hops=NUM_HOPS,
            kinds=tuple(k for k in kinds if not options.faults or k.name in options.faults),
            phases=tuple(p for p in Phase if not options.phases or p.name in options.phases),
        )
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            print(f"starting the swarm of {name}", flush=True)
            more = SERVER_OPTIONS if options.laptop else ()
            moving = stack.enter_context(MovingHost()) if ENV_OWN_NETWORK in os.environ else None
            runner = open_runner(name, stack, folder=folder, lab=lab, options=more, moving=moving)
            while True:
                outcomes.append(_run(runner, draw(space, options.seed, next(numbers))))
                if progress() >= share - _ROUNDING:
                    break
            _check_leases(runner, outcomes[-1])
    return outcomes


def _laptop_kinds(options: argparse.Namespace) -> tuple[FaultKind, ...]:
    return tuple(k for k in LAPTOP_LIFE if not options.faults or k.name in options.faults)


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


def _check_leases(runner: Runner, last: Outcome) -> None:
    leaks = [f"after all leases: {leak}" for leak in runner.leaks_after_leases()]
    for leak in leaks:
        print(f"PROBLEM {leak}", flush=True)
    last.problems += leaks


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
    path = Path(options.write) / f"chaos_{network.split(',')[0]}_{machine}_{today}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + table, encoding="utf-8")
    print(f"written: {path}")


def _options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.replace(",", " ").split()

    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--runs", type=int, help="number of scenarios, in place of minutes")
    parser.add_argument("--start", type=int, default=0, help="number of the first scenario")
    parser.add_argument("--only", type=int, help="number of the only scenario")
    parser.add_argument("--models", type=words, default=list(SPANS))
    parser.add_argument("--faults", type=words, default=[], help="names of FaultKind, else all")
    parser.add_argument("--phases", type=words, default=[], help="names of Phase, else all")
    parser.add_argument("--network", action="store_true", help="in a network laboratory (root)")
    parser.add_argument("--laptop", action="store_true", help="sleep, restarts, other hardware")
    parser.add_argument("--write", help="folder for the table of stalls")
    options = parser.parse_args()
    if options.only is not None:
        options.start, options.runs, options.models = options.only, 1, options.models[:1]
    return options


if __name__ == "__main__":
    sys.exit(main())
