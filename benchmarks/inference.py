"""How fast a small swarm on this machine answers, beside the same model run in this process.

    python benchmarks/inference.py --out benchmarks/results/inference_<machine>_<date>.md

Three servers of one thread each against one local process of one thread. See METHODOLOGY.md.
"""

import argparse
import datetime
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from machine import describe_machine
from petals import AutoDistributedModelForCausalLM
from petals.demo.model import get_demo_model
from petals.models.loading.cost import split_evenly
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from token_times import TokenTimes


@dataclass
class Sample:
    """Repeated measurements of one thing, in its own unit."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def row(self) -> str:
        low, _, high = statistics.quantiles(self.values, n=4)
        return f"| {self.name} | {self.median:.2f} | {low:.2f} to {high:.2f} | {self.unit} |"


def tokens_per_second(
    generate: Callable[..., torch.Tensor], prompt: torch.Tensor, count: int
) -> float:
    """Decoding speed of one generation: tokens after the first, per second after the first."""
    times = TokenTimes()
    generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=times)
    return (count - 1) / sum(times.gaps[1:])


def concurrent_tokens_per_second(
    model: object, prompts: Sequence[torch.Tensor], count: int
) -> float:
    """All tokens of simultaneous generations, prefill included, per second of wall clock."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    threads = [
        threading.Thread(target=model.generate, args=(prompt,), kwargs=options)
        for prompt in prompts
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(prompts) * count / (time.perf_counter() - begin)


def hop_overheads(model: object, prompts: Sequence[torch.Tensor], count: int) -> list[float]:
    """Milliseconds a step spends at each hop beyond waiting in its queue and computing."""
    overheads: list[float] = []

    def run(prompt: torch.Tensor) -> None:
        with model.inference_session(max_length=prompt.shape[1] + count) as session:
            model.generate(prompt, session=session, max_new_tokens=count, do_sample=False)
            for hop in session.trace.hops:
                for step in hop.steps[1:]:
                    compute = step.queue_seconds + step.compute_seconds
                    overheads.append(1e3 * (step.total_seconds - compute))

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return overheads


def memory_overheads(swarm: LocalSwarm, weights_bytes: int) -> list[float]:
    """MB of proportional set size of each server with its children, less its weights."""
    overheads = []
    for server in swarm.servers:
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
        pss = sum(member.memory_full_info().pss for member in family)
        overheads.append((pss - weights_bytes) / 1e6)
    return overheads


def measure(arguments: argparse.Namespace) -> str:
    """Run everything once and return the report."""
    torch.set_num_threads(1)
    path = arguments.model or str(get_demo_model("smollm2"))
    local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    num_blocks = local.config.num_hidden_layers
    block_bytes = sum(p.numel() * 4 for p in local.model.layers[0].parameters())
    config = LocalSwarmConfig(
        model=path,
        spans=split_evenly(num_blocks, arguments.servers),
        dtype="float32",
        num_threads=1,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(100, 20_000, (1, arguments.prompt_tokens), generator=generator)
        for _ in range(8)
    ]
    ready_began = time.perf_counter()
    with LocalSwarm(config) as swarm:
        ready_seconds = time.perf_counter() - ready_began
        model = AutoDistributedModelForCausalLM.from_pretrained(
            path, initial_peers=list(swarm.initial_peers), dtype=torch.float32
        )
        samples = decode_rounds(local, model, prompts, arguments)
        for count in (1, 8):
            values = hop_overheads(model, prompts[:count], arguments.tokens)
            samples.append(
                Sample(f"one hop beyond queue and compute, {count} sessions", "ms", values)
            )
        memory = memory_overheads(swarm, block_bytes * (num_blocks // arguments.servers))
    return report(arguments, samples, ready_seconds, memory)


def decode_rounds(
    local: object, model: object, prompts: Sequence[torch.Tensor], arguments: argparse.Namespace
) -> list[Sample]:
    """Local, swarm, one session, eight sessions, interleaved; the first round warms up."""
    samples = [
        Sample("local generate, 1 process, 1 thread", "tokens/s"),
        Sample(f"swarm of {arguments.servers}, 1 client", "tokens/s"),
        Sample("swarm, 1 session with prefill", "tokens/s"),
        Sample("swarm, 8 sessions with prefill, all together", "tokens/s"),
    ]
    for round_index in range(arguments.rounds + 1):
        values = [
            tokens_per_second(local.generate, prompts[0], arguments.tokens),
            tokens_per_second(model.generate, prompts[0], arguments.tokens),
            concurrent_tokens_per_second(model, prompts[:1], arguments.tokens),
            concurrent_tokens_per_second(model, prompts, arguments.tokens),
        ]
        if round_index:
            for sample, value in zip(samples, values):
                sample.values.append(value)
    return samples


def report(
    arguments: argparse.Namespace, samples: list[Sample], ready_seconds: float, memory: list[float]
) -> str:
    """The result file: figures first, then what they were taken on."""
    local, swarm, one, eight = (sample.median for sample in samples[:4])
    lines = [
        f"# Inference, {datetime.date.today()}",
        "",
        f"- one client, {arguments.servers} one-thread servers / local: **{swarm / local:.2f}**",
        f"- 8 concurrent sessions / 1: **{eight / one:.2f}**",
        f"- one hop beyond queue and compute: **{samples[4].median:.2f} ms** at 1 session, "
        f"**{samples[5].median:.2f} ms** at 8",
        f"- all servers started together, ready after {ready_seconds:.1f} s",
        f"- memory beside weights, proportional set size with the daemon, KV in use included: "
        f"{', '.join(f'{value:.0f}' for value in memory)} MB",
        "",
        "| what | median | quartiles | unit |",
        "| ---- | -----: | --------: | ---- |",
        *(sample.row() for sample in samples),
        "",
        f"{arguments.rounds} rounds, {arguments.tokens} new tokens after "
        f"{arguments.prompt_tokens}, f32, loopback.",
        describe_machine(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a local folder; the demo model if left out")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = measure(arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
