"""A swarm as people have it: servers in twelve cities, four of them and the client behind NATs.

    make bench RUN="real_world.py --out benchmarks/results/real_world_<where>.md"

The ``real-world-14`` preset of the network laboratory (root and /dev/net/tun), the client behind a
NAT of its own, addresses that look public. Blocks are dealt so that every route leads through the
four servers that nobody can dial, one behind the other. Says which way each edge and each control
stream took, what a token cost, and what it costs with all states going through the client.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from machine import describe_machine
from netlab import Host, NetLab, Topology, real_world
from petals import AutoDistributedModelForCausalLM
from petals.client.trace import SessionTrace, Way
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import COMMAND
from petals.testing.tiny_models import PUBLISHED, write_tiny_model
from token_times import TokenTimes

ENV_LAB = "REAL_WORLD_LAB"
CLIENT, BOOT = "client", "boot"
SUBNET = "44.128.0.0/16"
"""Looks public: what is private is neither announced through relays nor punched through."""

Spans = dict[tuple[int, int], tuple[str, ...]]
SPANS: Spans = {
    (0, 2): ("s02", "s03"),
    (2, 4): ("s07",),
    (4, 6): ("s08",),
    (6, 8): ("s12",),
    (8, 10): ("s10",),
    (10, 12): ("s09", "s11"),
    (12, 14): ("s13", "s14"),
    (14, 16): ("s01", "s04", "s05", "s06"),
}
NUM_BLOCKS, WIDTH = 16, 256
PORT = 31337


@dataclass(frozen=True, slots=True)
class Run:
    """What driving the swarm in one way gave; ``step_seconds`` is the median of a token."""

    trace: SessionTrace
    step_seconds: float
    prefill_seconds: float


class World:
    """The processes on the laboratory's hosts, which serve ``spans``; a context manager."""

    def __init__(self, lab: NetLab, folder: Path, model: Path, spans: Spans) -> None:
        self.lab, self.folder, self.model, self.spans = lab, folder, model, spans
        self.host_of: dict[str, str] = {}
        self.address = ""
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "World":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start(self) -> None:
        """The bootstrap peer, then whoever can be dialled, then the others: they need relays."""
        self._run(BOOT, ["bootstrap", "--port", str(PORT)])
        told = self._await(BOOT)["initial_peers"]
        self.address = next(a for a in told if self.lab.ip(BOOT) in a and "quic" in a)
        spans = {host: span for span, hosts in self.spans.items() for host in hosts}
        hidden = [host for host in spans if self.nat(host) != "none"]
        for group in ([host for host in spans if host not in hidden], hidden):
            for host in group:
                self._serve(host, spans[host])
            for host in group:
                self.host_of[self._await(host)["peer_id"]] = host
                print(f"{host} is online", flush=True)

    def _serve(self, host: str, span: tuple[int, int]) -> None:
        words = ["serve", str(self.model), "--blocks", f"{span[0]}:{span[1]}", "--threads", "1"]
        words += ["--dtype", "float32", "--join", self.address, "--public-name", host]
        self._run(host, words)

    def _run(self, host: str, words: list[str]) -> None:
        ready = ["--ready-file", str(self.folder / f"{host}.json"), "--until-stdin-closes"]
        with (self.folder / f"{host}.log").open("wb") as log:
            process = self.lab.popen(
                host,
                [*COMMAND, *words, *ready],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)

    def _await(self, host: str) -> dict[str, Any]:
        ready, deadline = self.folder / f"{host}.json", time.monotonic() + 300
        while not ready.exists():
            if time.monotonic() > deadline or self._processes[-1].poll() is not None:
                raise RuntimeError(f"{host}: {(self.folder / f'{host}.log').read_text()[-2000:]}")
            time.sleep(0.1)
        told: dict[str, Any] = json.loads(ready.read_text(encoding="utf-8"))
        return told

    def nat(self, host: str) -> str:
        """ "none", or what keeps others from dialling this host."""
        return self.lab.topology.host(host).nat

    def relays_of(self, host: str) -> tuple[str, ...]:
        """Whom a server is reached through, as it has said when it started."""
        by_ip = {self.lab.ip(name): name for name in self.lab.hosts}
        log = (self.folder / f"{host}.log").read_text(encoding="utf-8")
        said = re.findall(r"to be reached through (.*)", log)
        return tuple(by_ip[ip] for ip in re.findall(r"/ip4/([\d.]+)/", said[-1])) if said else ()

    def rtt_ms(self, one: str, other: str) -> float:
        """What the laboratory is set to."""
        return self.lab.link(one, other).rtt_ms


def main() -> None:
    options = _options()
    if ENV_LAB not in os.environ:
        with NetLab(_topology()) as lab:
            words = [sys.executable, *sys.argv]
            lab.run(CLIENT, words, env={**os.environ, ENV_LAB: lab.name}, check=True)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="real-world-") as name:
        folder = options.logs or Path(name)
        folder.mkdir(exist_ok=True)
        path = write_tiny_model(
            folder / "model",
            "bloom",
            layout=PUBLISHED["bloom"],
            num_hidden_layers=NUM_BLOCKS,
            hidden_size=WIDTH,
        )
        began = time.monotonic()
        with World(NetLab.attach(os.environ[ENV_LAB]), folder, path, SPANS) as world:
            print(f"online after {time.monotonic() - began:.0f} s", flush=True)
            text = measure(world, path, options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def _topology() -> Topology:
    """The real world; the client is behind a NAT, too, and a bootstrap peer is not."""
    world = real_world(subnet=SUBNET)
    hosts = [replace(h, nat="restricted") if h.name == CLIENT else h for h in world.hosts]
    boot = Host(BOOT, "fra", up="1gbit", down="1gbit", access_ms=0.3)
    return replace(world, hosts=(*hosts, boot))


def measure(world: World, path: Path, options: argparse.Namespace) -> str:
    """Drive the same servers as a ring and as a star; the result file."""
    ids = torch.arange(options.prompt_tokens).unsqueeze(0) % 90 + 3
    local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = local.generate(
        ids, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False
    )
    allowed = None
    runs: dict[str, list[Run]] = {"ring": [], "star": []}
    for _ in range(options.rounds):
        for way, found in runs.items():
            model = AutoDistributedModelForCausalLM.from_pretrained(
                str(path),
                initial_peers=[world.address],
                dtype=torch.float32,
                use_server_to_server=way == "ring",
                allowed_servers=allowed,
                show_route=False,
            )
            run, tokens = _drive(model, ids, options.tokens)
            assert_same_tokens(local, expected[0], tokens[0])
            allowed = allowed or [hop.peer_id for hop in run.trace.hops]
            found.append(run)
            ways = ", ".join(str(edge.way) for edge in run.trace.edges)
            print(
                f"{way}: first token after {run.prefill_seconds:.1f} s, then "
                f"{1e3 * run.step_seconds:.0f} ms a token; {ways}",
                flush=True,
            )
    return report(world, runs, options)


def _drive(model: Any, ids: torch.Tensor, num_tokens: int) -> tuple[Run, torch.Tensor]:
    times = TokenTimes()
    with model.inference_session(max_length=ids.shape[1] + num_tokens) as session:
        tokens = model.generate(
            ids,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            streamer=times,
        )
        trace = session.trace
    return Run(trace, median(times.gaps[1:]), times.gaps[0]), tokens


def report(world: World, runs: dict[str, list[Run]], options: argparse.Namespace) -> str:
    """The result file."""
    ring, star = runs["ring"][-1], runs["star"][-1]
    seconds = {way: median(run.step_seconds for run in found) for way, found in runs.items()}
    hosts = [world.host_of[hop.peer_id] for hop in ring.trace.hops]
    around = _delay_ms(world, [CLIENT, *hosts, CLIENT])
    there_and_back = sum(world.rtt_ms(CLIENT, host) for host in hosts)
    compute = sum(
        hop.median_seconds("compute") + hop.median_seconds("queue") for hop in ring.trace.hops
    )
    lines = [
        f"# real-world-14, {datetime.date.today()}",
        "",
        f"Route: client, {', '.join(hosts)}, client. Tokens equal those of the local model in all "
        f"{sum(map(len, runs.values()))} runs.",
        "",
        "| way | ms a token | tokens/s | the set delays alone, ms | first token after, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, delay in (("ring", around), ("star", there_and_back)):
        lines.append(
            f"| {way} | {1e3 * seconds[way]:.0f} | {1 / seconds[way]:.2f} | {delay:.0f} | "
            f"{', '.join(f'{run.prefill_seconds:.1f}' for run in runs[way])} |"
        )
    return "\n".join(
        [
            *lines,
            *_edge_lines(world, ring, hosts),
            *_stream_lines(world, ring, star, hosts),
            *_footer(world, options, compute),
        ]
    )


def _delay_ms(world: World, hosts: list[str]) -> float:
    return sum(world.rtt_ms(one, other) / 2 for one, other in pairwise(hosts))


def _edge_lines(world: World, ring: Run, hosts: list[str]) -> list[str]:
    lines = [
        "",
        "Edges of the ring:",
        "",
        "| from | to | way | RTT set, ms |",
        "| --- | --- | --- | ---: |",
    ]
    for (near, far), edge in zip(pairwise(hosts), ring.trace.edges, strict=True):
        way = str(edge.way)
        if edge.way is Way.DIRECT:
            way = _how(world, near, far)
        elif edge.way is Way.RELAYED:
            way = _through(world, near, far)
        names = " | ".join(f"{host} ({world.nat(host)})" for host in (near, far))
        lines.append(f"| {names} | {way} | {world.rtt_ms(near, far):.0f} |")
    return lines


def _stream_lines(world: World, ring: Run, star: Run, hosts: list[str]) -> list[str]:
    lines = [
        "",
        f"Control streams of the client ({world.nat(CLIENT)}), which in the star carry all states:",
        "",
        "| to | way (ring) | way (star) | RTT set, ms | a step there in the star, ms |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for host, hop, alone in zip(hosts, ring.trace.hops, star.trace.hops, strict=True):
        ways = [
            _through(world, CLIENT, host) if trace.is_relayed else _how(world, CLIENT, host)
            for trace in (hop, alone)
        ]
        lines.append(
            f"| {host} ({world.nat(host)}) | {' | '.join(ways)} | "
            f"{world.rtt_ms(CLIENT, host):.0f} | {1e3 * alone.median_seconds():.0f} |"
        )
    return lines


def _how(world: World, near: str, far: str) -> str:
    """What a direct connection must have come from."""
    if world.nat(far) == "none":
        return "direct, dialled"
    return "direct, dialled back" if world.nat(near) == "none" else "direct, hole-punched"


def _through(world: World, near: str, far: str) -> str:
    """The relays there are, and the RTT that each of them would make."""
    ways = [
        f"{relay} {world.rtt_ms(near, relay) + world.rtt_ms(relay, far):.0f} ms"
        for relay in world.relays_of(far)
    ]
    return f"relayed ({' or '.join(ways)})"


def _footer(world: World, options: argparse.Namespace, compute: float) -> list[str]:
    stats = world.lab.stats()
    return [
        "",
        "Direct, dialled back: the far end cannot be dialled, but has made the connection itself. "
        "Hole-punched: neither end can be dialled (a full-cone NAT lets anybody in at a port that "
        "its host has used, which is why even a symmetric one reaches it).",
        "",
        "The first token waits until the hops have met; in the first round most have not yet. "
        f"Queue and compute of all hops: {1e3 * compute:.0f} ms a token. BLOOM of {NUM_BLOCKS} "
        f"blocks, width {WIDTH}, random, f32; {options.rounds} rounds of {options.tokens} tokens "
        f"after {options.prompt_tokens}, ring and star in turn; the ways are those of the last.",
        f"{describe_machine()} Forwarder: {stats}.",
        "",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--logs", type=Path, help="an empty folder that keeps what servers said")
    return parser.parse_args()


if __name__ == "__main__":
    main()
