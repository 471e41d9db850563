"""How long a sentence pauses on a GPU when one of its servers is killed or leaves.

    python benchmarks/gpu_failover.py --out benchmarks/results/gpu_failover_<card>_<date>.md

Three spans, several servers each, all on one card; f32, so that the tokens must be those of the
undisturbed run. Every fault takes its victim for good. See METHODOLOGY.md.
"""

import argparse
import datetime
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu import client_of, publish, write_random
from machine import describe_machine
from petals.client.model.inference_session import InferenceSession
from petals.models.loading.cost import split_evenly
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig

NUM_HOPS = 3
TOKENS_BEFORE = 16
TOKENS_AFTER = 48
FAULTS = ("kill", "leave")


@dataclass(frozen=True, slots=True)
class Run:
    """``gap_seconds``: the longest time between two tokens after the fault; ``step_seconds`` the
    median one; ``mended_seconds``: what the repair, or the change of a hand-over, took of it."""

    fault: str
    context: int
    hop: int
    gap_seconds: float
    step_seconds: float
    mended_seconds: float

    @property
    def row(self) -> str:
        seconds = (self.step_seconds, self.gap_seconds, self.mended_seconds)
        figures = " | ".join(f"{1000 * figure:.0f}" for figure in seconds)
        return f"| {self.fault} | {self.context} | {self.hop} | {figures} |"


class Watch:
    """A streamer that does something after some tokens and notes when each came."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._act = act

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == TOKENS_BEFORE:
            self._act()

    def end(self) -> None:
        pass

    @property
    def gaps(self) -> list[float]:
        """Between each token and the one before."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:])]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1000, 3000])
    parser.add_argument("--servers", type=int, default=4, help="servers per span")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish(report(options), options.out)


def report(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the result, as they are found out."""
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no card"
    with tempfile.TemporaryDirectory(prefix="petals-gpu-") as folder:
        config = write_random(options.shape, Path(folder), options)
        spans = split_evenly(config.num_hidden_layers, NUM_HOPS) * options.servers
        yield from (
            f"# Failover on one GPU, {datetime.date.today()}",
            "",
            f"{card}; {options.shape}, {config.num_hidden_layers} x {config.hidden_size} in f32; "
            f"{NUM_HOPS} spans, {options.servers} servers each. {describe_machine()}",
            "",
            "| fault | context | hop | a step, ms | longest gap after it, ms | mending, ms |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        )
        swarm_config = LocalSwarmConfig(
            model=folder,
            spans=spans,
            dtype="float32",
            server_options=("--device", options.device),
        )
        with LocalSwarm(swarm_config) as swarm:
            model = client_of(swarm, folder, torch.float32, options.device)
            for run in _runs(swarm, model, options):
                yield run.row


def _runs(swarm: LocalSwarm, model: PreTrainedModel, options: argparse.Namespace) -> Iterator[Run]:
    prompts = {context: _prompt(context, model, options) for context in options.contexts}
    plan = {
        "max_new_tokens": TOKENS_BEFORE + TOKENS_AFTER,
        "min_new_tokens": TOKENS_BEFORE + TOKENS_AFTER,
        "do_sample": False,
    }
    expected = {context: model.generate(ids, **plan) for context, ids in prompts.items()}
    hop = 0
    for fault in FAULTS:
        for context, ids in prompts.items():
            length = context + TOKENS_BEFORE + TOKENS_AFTER
            with model.remote_blocks.open_session(max_length=length) as session:
                watch = Watch(partial(_strike, swarm, session, fault, hop))
                actual = model.generate(ids, session=session, streamer=watch, **plan)
                (repair,) = session.trace.repairs
            assert_same_tokens(model, expected[context][0], actual[0])
            gaps = watch.gaps
            yield Run(
                fault,
                context,
                hop,
                max(gaps[TOKENS_BEFORE - 2 :]),
                median(gaps),
                repair.stall_seconds,
            )
            hop = (hop + 1) % NUM_HOPS


def _strike(swarm: LocalSwarm, session: InferenceSession, fault: str, hop: int) -> None:
    """Kill the server of one hop and all that belongs to it, or ask it to leave."""
    peer_id = session.trace.hops[hop].peer_id
    victim = next(server for server in swarm.servers if server.peer_id == peer_id)
    if fault == "kill":
        swarm.kill(victim)
    else:
        os.kill(victim.pid, signal.SIGTERM)


def _prompt(context: int, model: PreTrainedModel, options: argparse.Namespace) -> Tensor:
    draw = torch.Generator().manual_seed(context)
    ids = torch.randint(10, model.config.vocab_size, (1, context), generator=draw)
    return ids.to(options.device)


if __name__ == "__main__":
    main()
