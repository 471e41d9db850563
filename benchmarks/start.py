"""How long it takes until a server serves, and until the demo has answered.

    python benchmarks/start.py --out benchmarks/results/start_<machine>_<date>.md

One server of ten blocks of SmolLM2 with one thread, alone but for its bootstrap peer, from the
command until it says that it is online; then `petals demo` from the command until its first words,
its last, and the end of the clean stop. Python must be allowed to keep its byte code, as it is by
default: PYTHONDONTWRITEBYTECODE is taken out of the environment.
"""

import argparse
import datetime
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from machine import describe_machine
from petals.demo.model import get_demo_model
from petals.testing.local_swarm import COMMAND

STAGES = ("Looking at", "Joining", "Loading blocks", "Online")
"""What a server says first at each stage; it looks when torch and transformers are imported."""


@dataclass(slots=True)
class Times:
    """Seconds from the command until something, of every run."""

    name: str
    seconds: list[float] = field(default_factory=list)

    def row(self) -> str:
        each = ", ".join(f"{value:.2f}" for value in self.seconds)
        return f"| {self.name} | {median(self.seconds):.2f} | {each} |"


@contextmanager
def bootstrap_peer() -> Iterator[str]:
    """Its address."""
    peer = subprocess.Popen([*COMMAND, "bootstrap"], stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    try:
        yield peer.stdout.readline().strip()
    finally:
        peer.terminate()
        peer.communicate()


def start_server(model: str, address: str, environment: dict[str, str]) -> list[float]:
    """Seconds until each of STAGES."""
    began = time.perf_counter()
    arguments = ("serve", model, "--join", address, "--blocks", "0:10")
    server = subprocess.Popen(
        [*COMMAND, *arguments, "--dtype", "float32", "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    found: list[float] = []
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith(STAGES[len(found)]):
            found.append(time.perf_counter() - began)
        if len(found) == len(STAGES):
            break
    server.terminate()
    server.communicate()
    if len(found) < len(STAGES):
        raise SystemExit("The server did not come online.")
    return found


def run_demo(environment: dict[str, str], num_tokens: int) -> list[float]:
    """Seconds until the first words, until the last, and until nothing is left."""
    began = time.perf_counter()
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--max-new-tokens", str(num_tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert demo.stdout is not None
    found: list[float] = []
    while os.read(demo.stdout.fileno(), 65536):
        found.append(time.perf_counter() - began)
    if demo.wait() or not found:
        raise SystemExit("The demo did not answer.")
    return [found[0], found[-1], time.perf_counter() - began]


def measure(arguments: argparse.Namespace) -> str:
    """Run everything and return the report."""
    model = str(get_demo_model("smollm2"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    server = [Times(f"server: {stage}" + " …" * (stage != "Online")) for stage in STAGES]
    for _ in range(arguments.runs + 1):
        with bootstrap_peer() as address:  # a new one: it would remember members that are gone
            note(server, start_server(model, address, environment))
    names = ("first words", "last words", "nothing is left")
    demo = [Times(f"demo, {arguments.tokens} tokens: {name}") for name in names]
    for _ in range(arguments.runs + 1):
        note(demo, run_demo(environment, arguments.tokens))
    return report([*server, *demo])


def note(times: Sequence[Times], seconds: Sequence[float]) -> None:
    """Add a run."""
    for entry, value in zip(times, seconds, strict=True):
        entry.seconds.append(value)


def report(times: Sequence[Times]) -> str:
    """The result file. The first run of each has warmed the machine up and is left out."""
    for entry in times:
        del entry.seconds[0]
    return "\n".join(
        [
            f"# Starting, {datetime.date.today()}",
            "",
            "Seconds from the command (`benchmarks/start.py`).",
            "",
            "| until | median | each |",
            "| --- | ---: | --- |",
            *(entry.row() for entry in times),
            "",
            describe_machine(),
            "",
        ]
    )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = measure(arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
