"""The long run: `make nemesis SEED=1 MINUTES=5`, `ONLY=17` to repeat one scene.

With root and /dev/net/tun everything runs in a network laboratory, and links fail, too.
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
from pathlib import Path

import torch

from nemesis.netlab import NetLab
from nemesis.play import Director, Outcome
from nemesis.report import failure_list, stall_table
from nemesis.schedule import ON_PROCESSES, Fault, Phase, Scene, Stage, draw
from nemesis.stages import LAB_HOSTS, SPANS, open_director

MAX_SCENES = 100_000
RTT_MS = 5
ENV_LAB = "NEMESIS_LAB"
"""Name of the laboratory, for the child that runs on its client's host."""


def main() -> int:
    options = _options()
    if options.network and ENV_LAB not in os.environ:
        return _inside_a_laboratory()
    torch.set_num_threads(1)
    outcomes = _run(options)
    table = f"{stall_table(outcomes)}\n\n## Failures\n\n{failure_list(outcomes)}\n"
    print(table)
    if options.write:
        _write(options, outcomes, table)
    failed = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes)} runs, {len(failed)} failed (seed {options.seed})")
    return 1 if failed else 0


def _run(options: argparse.Namespace) -> list[Outcome]:
    weights = {"bloom": 4, "smollm2": 1}
    models = [(name, weights[name]) for name in options.models]
    lab = NetLab.attach(os.environ[ENV_LAB]) if options.network else None
    faults = tuple(Fault) if lab is not None else ON_PROCESSES
    faults = tuple(f for f in faults if not options.faults or f.name in options.faults)
    phases = tuple(p for p in Phase if not options.phases or p.name in options.phases)
    stage = Stage(models=models, num_hops=3, faults=faults, phases=phases)
    numbers = range(options.start, MAX_SCENES) if options.only is None else [options.only]
    ends_at = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    # One model after the other: two swarms would not fit on a small machine.
    scenes = (draw(stage, options.seed, number) for number in numbers)
    with tempfile.TemporaryDirectory(prefix="nemesis-") as folder:
        for index, (name, weight) in enumerate(models):
            shares = sum(w for _, w in models[index:])
            until = time.monotonic() + (ends_at - time.monotonic()) * weight / shares
            with ExitStack() as stack:
                print(f"starting the swarm of {name}", flush=True)
                director = open_director(name, stack, folder=Path(folder), lab=lab)
                for scene in scenes:
                    outcomes.append(_play(director, scene, name))
                    if time.monotonic() > until:
                        break
                _settle(director, outcomes)
            if options.only is not None:
                break
    return outcomes


def _play(director: Director, scene: Scene, model: str) -> Outcome:
    scene = Scene(scene.seed, scene.number, model, scene.phase, scene.strikes)
    began = time.monotonic()
    print(scene, flush=True)
    outcome = director.play(scene)
    stall = max(outcome.stalls, default=0.0)
    landed = "" if outcome.landed else ", came too late"
    verdict = "FAILED" if outcome.problems else "ok"
    print(f"  {verdict}, stall {stall:.2f} s, {time.monotonic() - began:.1f} s{landed}")
    for note in outcome.notes:
        print(f"  {note}")
    for problem in outcome.problems:
        print(f"  PROBLEM {problem}")
    if outcome.problems:
        print(f"  repeat: make nemesis SEED={scene.seed} ONLY={scene.number} MODELS={model}")
    sys.stdout.flush()
    return outcome


def _settle(director: Director, outcomes: list[Outcome]) -> None:
    leaks = director.settle()
    for leak in leaks:
        print(f"PROBLEM after all leases: {leak}", flush=True)
    if leaks and outcomes:
        outcomes[-1].problems += [f"after all leases: {leak}" for leak in leaks]


def _inside_a_laboratory() -> int:
    """Run this program again on the client's host of a new laboratory."""
    with NetLab(hosts=list(LAB_HOSTS), rtt_ms=RTT_MS, up="1gbit", down="1gbit") as lab:
        words = [sys.executable, "-m", "nemesis", *sys.argv[1:]]
        return lab.run("client", words, env={**os.environ, ENV_LAB: lab.name}).returncode


def _write(options: argparse.Namespace, outcomes: list[Outcome], table: str) -> None:
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    today = datetime.date.today().isoformat()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    network = f"laboratory, {RTT_MS} ms between all" if options.network else "loopback"
    late = sum(not outcome.landed for outcome in outcomes)
    head = (
        f"# Nemesis, {machine}, {today}\n\n"
        f"Commit {commit}, seed {options.seed}, {len(outcomes)} runs, network: {network}.\n"
        f"Stall: the longest gap between two tokens minus the median gap (or the delay of the "
        f"first token), of the client that was hit hardest. {late} faults came after the last "
        f"token and count only as runs.\n\n"
    )
    path = Path(options.write) / f"nemesis_{machine}_{today}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + table, encoding="utf-8")
    print(f"written: {path}")


def _options() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.replace(",", " ").split()

    parser = argparse.ArgumentParser(prog="nemesis", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--start", type=int, default=0, help="number of the first scene")
    parser.add_argument("--only", type=int, help="number of the only scene")
    parser.add_argument("--models", type=words, default=list(SPANS))
    parser.add_argument("--faults", type=words, default=[], help="names of Fault, else all")
    parser.add_argument("--phases", type=words, default=[], help="names of Phase, else all")
    parser.add_argument("--network", action="store_true", help="in a network laboratory (root)")
    parser.add_argument("--write", help="folder for the table of stalls")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
