"""What it saves that states travel from server to server, and that it costs nothing at home.

    make bench RUN="ring.py --out benchmarks/results/ring_<machine>_<date>.md"

The same three one-thread servers of SmolLM2 driven as a ring and as a star, round by round: first
on loopback, then (root and /dev/net/tun) on hosts of a network laboratory with 100 ms between all.
With n hops and c = what a token costs without a network, a ring should be faster by
(n RTT + c) / ((n + 1) RTT / 2 + c).
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from chaos.cluster import CLIENT_HOST, Cluster, laboratory
from machine import describe_machine
from netlab import NetLab
from petals import AutoDistributedModelForCausalLM
from petals.demo.model import get_demo_model
from petals.models.loading.cost import split_evenly
from petals.testing.local_swarm import LocalSwarmConfig
from token_times import TokenTimes

NUM_HOPS = 3
ENV_LAB, ENV_FILE = "RING_LAB", "RING_FILE"
WAYS = {"ring": True, "star": False}
Samples = dict[str, list[float]]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if ENV_LAB in os.environ:
        samples = measure(options, NetLab.attach(os.environ[ENV_LAB]))
        Path(os.environ[ENV_FILE]).write_text(json.dumps(samples), encoding="utf-8")
        return
    at_home = measure(options, None)
    text = report(at_home, _in_a_laboratory(options), options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def measure(options: argparse.Namespace, lab: NetLab | None) -> Samples:
    """Seconds of a token, by way: medians of rounds that take turns."""
    path = str(get_demo_model("smollm2"))
    config = LocalSwarmConfig(
        model=path, spans=split_evenly(30, NUM_HOPS), dtype="float32", num_threads=1
    )
    samples: Samples = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory(prefix="ring-") as folder,
        Cluster(config, Path(folder), lab) as swarm,
    ):
        models = {
            way: AutoDistributedModelForCausalLM.from_pretrained(
                path,
                initial_peers=list(swarm.initial_peers),
                dtype=torch.float32,
                use_server_to_server=direct,
                show_route=False,
            )
            for way, direct in WAYS.items()
        }
        for round_index in range(options.rounds + 1):
            for way, model in models.items():
                seconds = _seconds_per_token(model, options)
                if round_index:
                    samples[way].append(seconds)
    return samples


def _seconds_per_token(model: Any, options: argparse.Namespace) -> float:
    ids = torch.arange(100, 100 + options.prompt_tokens).unsqueeze(0)
    times, count = TokenTimes(), options.tokens
    model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=times)
    return median(times.gaps[1:])


def _in_a_laboratory(options: argparse.Namespace) -> Samples:
    with (
        tempfile.TemporaryDirectory(prefix="ring-") as folder,
        laboratory(options.rtt_ms, "100mbit") as lab,
    ):
        file = Path(folder) / "samples.json"
        environment = {**os.environ, ENV_LAB: lab.name, ENV_FILE: str(file)}
        lab.run(CLIENT_HOST, [sys.executable, *sys.argv], env=environment, check=True)
        samples: Samples = json.loads(file.read_text(encoding="utf-8"))
        return samples


def report(at_home: Samples, far: Samples, options: argparse.Namespace) -> str:
    """The result file."""
    rtt, n = options.rtt_ms / 1e3, NUM_HOPS
    c = median(at_home["ring"])
    ideal = (n * rtt + c) / ((n + 1) * rtt / 2 + c)
    gain = median(far["star"]) / median(far["ring"])
    lines = [
        f"# Ring against star, {datetime.date.today()}",
        "",
        f"- at {options.rtt_ms:.0f} ms between all: the ring is **{gain:.3f}** times as fast as "
        f"the star; {ideal:.3f} is ideal with {n} hops and c = {1e3 * c:.0f} ms: "
        f"**{gain / ideal:.3f}** of it (aim 0.95)",
        f"- on loopback: **{median(at_home['star']) / median(at_home['ring']):.3f}** times (aim 1)",
        "",
        "| where | way | median ms a token | quartiles |",
        "| --- | --- | ---: | ---: |",
    ]
    for where, samples in (("loopback", at_home), (f"{options.rtt_ms:.0f} ms", far)):
        for way, values in samples.items():
            low, _, high = quantiles(values, n=4)
            lines.append(
                f"| {where} | {way} | {1e3 * median(values):.1f} | "
                f"{1e3 * low:.1f} to {1e3 * high:.1f} |"
            )
    lines += [
        "",
        f"c is the ring's time on loopback. {options.rounds} rounds of {options.tokens} tokens "
        f"after {options.prompt_tokens}, SmolLM2-135M in f32, 100 Mbit/s.",
        describe_machine(),
        "",
    ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rtt-ms", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
