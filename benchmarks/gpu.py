"""How a small swarm on one GPU answers and learns, beside the same model on the same GPU.

    python benchmarks/gpu.py --out benchmarks/results/gpu_<card>_<date>.md

Three servers share the card; the client's embeddings and head are on it, too. The checkpoints are
random, in the shapes of published models: speed and exactness do not depend on what the weights
say. See METHODOLOGY.md.
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from inference import Sample, concurrent_tokens_per_second, hop_overheads, tokens_per_second
from machine import describe_machine
from petals import AutoDistributedModelForCausalLM
from petals.models.loading.cost import split_evenly
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
    },
    "bloom": {"hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 32_000},
}
"""Of Llama 3.2 1B and BLOOM 1.1B, with smaller vocabularies."""

TINY_ON_CPU = {"hidden_size": 64, "num_hidden_layers": 6, "n_layer": 6, "vocab_size": 1000}
"""What `--device cpu` changes, which only shows that this script works."""

NUM_SESSIONS = 8
LONG_PROMPT_TOKENS = 1900
BATCH = (16, 128)
QUANTS = ("bnb-int8", "nf4")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    publish(report(options), options.out)


def publish(found: Iterable[str], out: Path | None) -> None:
    """Print and write lines as they are found: what was measured stays, whatever ends the rest."""
    lines: list[str] = []
    for line in found:
        print(line, flush=True)
        lines.append(line)
        if out:
            out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def report(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the result, as they are found out."""
    yield from _head(options)
    for name in options.shapes:
        with tempfile.TemporaryDirectory(prefix="petals-gpu-") as folder:
            config = write_random(name, Path(folder), options)
            yield from (f"## {name}: {config.num_hidden_layers} x {config.hidden_size}", "")
            yield from (exactness(folder, config, options), "")
            yield from (*speeds(folder, config, options), "")
            for quant in QUANTS if options.device == "cuda" else ():
                yield quantized(folder, config, options, quant)
            yield ""


def write_random(name: str, folder: Path, options: argparse.Namespace) -> PretrainedConfig:
    """A checkpoint of this shape in bfloat16."""
    values = SHAPES[name] | (TINY_ON_CPU if options.device == "cpu" else {})
    known = AutoConfig.for_model(name)
    values = {key: value for key, value in values.items() if hasattr(known, key)}
    config = AutoConfig.for_model(name, **values)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return config


def open_swarm(
    folder: str, config: PretrainedConfig, options: argparse.Namespace, dtype: str, *more: str
) -> LocalSwarm:
    """Three servers on the device."""
    return LocalSwarm(
        LocalSwarmConfig(
            model=folder,
            spans=split_evenly(config.num_hidden_layers, 3),
            dtype=dtype,
            server_options=("--device", options.device, *more),
        )
    )


def client_of(swarm: LocalSwarm, folder: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The distributed model, its own share on the device."""
    peers = list(swarm.initial_peers)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=peers, dtype=dtype
    )
    return model.to(device)


def local_of(folder: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The whole model on the device."""
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return local.eval().requires_grad_(False).to(device)


def exactness(folder: str, config: PretrainedConfig, options: argparse.Namespace) -> str:
    """Tokens in f32 through the swarm and at home; raises if they are not the same."""
    prompt = _ids((1, 100), config, options)
    local = local_of(folder, torch.float32, options.device)
    with open_swarm(folder, config, options, "float32") as swarm:
        model = client_of(swarm, folder, torch.float32, options.device)
        for mode in ({}, {"num_beams": 3}):
            plan = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, **mode}
            expected, actual = local.generate(prompt, **plan), model.generate(prompt, **plan)
            assert_same_tokens(local, expected[0], actual[0])
        with torch.inference_mode():
            wanted, got = local(prompt).logits, model(prompt).logits
    difference = (wanted - got).abs().max() / wanted.abs().max()
    return f"f32: the tokens of the local model (greedy, 3 beams); logits within {difference:.1e}."


def speeds(folder: str, config: PretrainedConfig, options: argparse.Namespace) -> list[str]:
    """Decoding, a long prompt, hidden states and gradients in bf16; rounds interleaved."""
    device = options.device
    local = local_of(folder, torch.bfloat16, device)
    prompts = [_ids((1, 64), config, options, seed) for seed in range(NUM_SESSIONS)]
    long = _ids((1, LONG_PROMPT_TOKENS), config, options)
    batch = _ids(BATCH, config, options)
    with open_swarm(folder, config, options, "bfloat16") as swarm:
        model = client_of(swarm, folder, torch.bfloat16, device)
        rows: list[tuple[Sample, Callable[[], float]]] = [
            (
                Sample("local, 1 client", "tokens/s"),
                lambda: tokens_per_second(local.generate, prompts[0], options.tokens),
            ),
            (
                Sample("swarm, 1 client", "tokens/s"),
                lambda: tokens_per_second(model.generate, prompts[0], options.tokens),
            ),
            (
                Sample("swarm, 1 session with prefill", "tokens/s"),
                lambda: concurrent_tokens_per_second(model, prompts[:1], options.tokens),
            ),
            (
                Sample(f"swarm, {NUM_SESSIONS} sessions with prefill", "tokens/s"),
                lambda: concurrent_tokens_per_second(model, prompts, options.tokens),
            ),
            (
                Sample(f"local, first token after {long.shape[1]}", "s"),
                lambda: _first_token(local, long),
            ),
            (
                Sample(f"swarm, first token after {long.shape[1]}", "s"),
                lambda: _first_token(model, long),
            ),
            (Sample("local, gradients of 16 x 128", "s"), lambda: _gradients(local, batch)),
            (Sample("swarm, gradients of 16 x 128", "s"), lambda: _gradients(model, batch)),
        ]
        for round_index in range(options.rounds + 1):
            for sample, take in rows:
                value = take()
                print(f"{sample.name}: {value:.3g} {sample.unit}", file=sys.stderr)
                if round_index:
                    sample.values.append(value)
        hops = [
            Sample(
                f"one hop beyond queue and compute, {count} sessions",
                "ms",
                hop_overheads(model, prompts[:count], options.tokens),
            )
            for count in (1, NUM_SESSIONS)
        ]
    samples = [sample for sample, _ in rows] + hops
    at_home, swarmed, one, eight, first, first_swarm, learn, learn_swarm = (
        sample.median for sample in samples[:8]
    )
    return [
        f"bf16: one client / local **{swarmed / at_home:.2f}**, {NUM_SESSIONS} sessions / 1 "
        f"**{eight / one:.2f}**, long prompt swarm / local {first_swarm / first:.2f}, gradients "
        f"{learn_swarm / learn:.2f}.",
        "",
        "| what | median | quartiles | unit |",
        "| ---- | -----: | --------: | ---- |",
        *(sample.row() for sample in samples),
    ]


def quantized(
    folder: str, config: PretrainedConfig, options: argparse.Namespace, quant: str
) -> str:
    """Bytes on the card, error and speed with bitsandbytes' weights."""
    prompt = _ids((1, 64), config, options)
    local = local_of(folder, torch.bfloat16, options.device)
    with torch.inference_mode():
        wanted = local(prompt).logits.float()
    before = _used_bytes()
    with open_swarm(folder, config, options, "bfloat16", "--quant", quant) as swarm:
        used = (_used_bytes() - before) / len(swarm.servers) / 1e9
        model = client_of(swarm, folder, torch.bfloat16, options.device)
        with torch.inference_mode():
            got = model(prompt).logits.float()
        speed = median(
            tokens_per_second(model.generate, prompt, options.tokens) for _ in range(options.rounds)
        )
    error = (wanted - got).norm() / wanted.norm()
    same = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return (
        f"- {quant}: {used:.2f} GB of the card a server with everything, {speed:.0f} tokens/s, "
        f"logits off by {error:.1%} (random weights), {same:.0%} of next tokens the same"
    )


def _first_token(model: PreTrainedModel, prompt: Tensor) -> float:
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    return time.perf_counter() - began


def _gradients(model: PreTrainedModel, batch: Tensor) -> float:
    """Seconds of a pass forward and back to the inputs of the first block."""
    began = time.perf_counter()
    inputs = model.get_input_embeddings()(batch).detach().requires_grad_()
    model(inputs_embeds=inputs, labels=batch).loss.backward()
    assert inputs.grad is not None
    inputs.grad.float().sum().item()
    return time.perf_counter() - began


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _ids(
    size: tuple[int, int], config: PretrainedConfig, options: argparse.Namespace, seed: int = 0
) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(10, config.vocab_size, size, generator=draw).to(options.device)


def _head(options: argparse.Namespace) -> list[str]:
    card = torch.cuda.get_device_name() if options.device == "cuda" else "no card"
    return [
        f"# One GPU, three servers, {datetime.date.today()}",
        "",
        f"{card}; {options.rounds} rounds, {options.tokens} new tokens. {describe_machine()}",
        "",
    ]


if __name__ == "__main__":
    main()
