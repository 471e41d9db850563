"""How fast a swarm reads and learns, beside the same model in this process.

    python benchmarks/training.py --out benchmarks/results/training_<machine>_<date>.md

Three one-thread servers of SmolLM2 and a one-thread client against one local process of one
thread, same weights, same batches, same parameters that learn: hidden states of 64 x 128 tokens, a
deep prompt-tuning step and a LoRA step of 4 x 128.

Losses are compared in passing, with a control: the same training at home once more, from parameters
that differ by 1e-8. Training amplifies the last bits; what the control shows is not the swarm's.
"""

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from machine import describe_machine
from petals import AutoDistributedModel, AutoDistributedModelForCausalLM
from petals.demo.model import get_demo_model
from petals.models.loading.cost import split_evenly
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig

NUM_PROMPT_TOKENS = 16
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SEQUENCE_TOKENS = 128
CONTROL_DISTANCE = 1e-8


@dataclass
class Pair:
    """Seconds of one piece of work in the swarm and at home, round by round.

    differences: between the swarm's results and those at home; control: between two runs at home.
    """

    name: str
    aim: float
    swarm: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.local) / median(self.swarm)

    def rows(self) -> list[str]:
        found = []
        for where, values in (("swarm", self.swarm), ("local", self.local)):
            low, _, high = quantiles(values, n=4)
            found.append(
                f"| {self.name} | {where} | {median(values):.2f} | {low:.2f} to {high:.2f} |"
            )
        return found


class DeepPrompts(nn.Module):
    """What deep prompt tuning is, on a local model: vectors in front, and more in every block."""

    def __init__(self, model: Any, first: Tensor, deep: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.first = nn.Parameter(first.clone())
        self.deep = nn.Parameter(deep.clone())

    def forward(self, ids: Tensor) -> Tensor:
        """ids [rows, tokens] -> the loss."""
        num_rows, num_prompts = len(ids), len(self.first)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([self.first.expand(num_rows, -1, -1), embeds], dim=1)
        # As in the swarm, what the prompts say is cut off: nothing predicts the first token.
        ignored = torch.full((num_rows, num_prompts + 1), -100)
        layers = self.model.model.layers
        hooks = [
            layer.register_forward_pre_hook(self._adding(block), with_kwargs=True)
            for block, layer in enumerate(layers)
        ]
        try:
            labels = torch.cat([ignored, ids[:, 1:]], dim=1)
            loss: Tensor = self.model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
            return loss
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, block: int) -> Callable[..., Any]:
        def add(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0]
            count = len(self.first)
            prompted = hidden[:, :count] + self.deep[block]
            return (torch.cat([prompted, hidden[:, count:]], dim=1), *args[1:]), kwargs

        return add


def measure(options: argparse.Namespace) -> str:
    """Run everything once and return the report."""
    torch.set_num_threads(1)
    path = str(get_demo_model("smollm2"))
    config = LocalSwarmConfig(
        model=path, spans=split_evenly(30, options.servers), dtype="float32", num_threads=1
    )
    with ExitStack() as stack:
        swarm = stack.enter_context(LocalSwarm(config))
        peers = {"initial_peers": list(swarm.initial_peers), "dtype": torch.float32}
        pairs = [
            forwards(path, peers, options),
            prompt_steps(path, peers, options),
            lora_steps(path, peers, options),
        ]
        memory = kept_bytes_per_token(path, peers, swarm, options)
    return report(options, pairs, memory)


def forwards(path: str, peers: dict[str, Any], options: argparse.Namespace) -> Pair:
    """Hidden states of a batch, without gradients and without a head."""
    pair = Pair(f"hidden states of {options.batch} x {SEQUENCE_TOKENS}", 1.5)
    remote = AutoDistributedModel.from_pretrained(path, **peers)
    local = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        for index in range(options.rounds + 1):
            ids = _ids(options.batch, index)
            theirs, seconds = _timed(lambda ids=ids: remote(ids).last_hidden_state)
            ours, local_seconds = _timed(lambda ids=ids: local(ids, use_cache=False)[0])
            _note(pair, index, seconds, local_seconds, float((theirs - ours).abs().max()))
    return pair


def prompt_steps(path: str, peers: dict[str, Any], options: argparse.Namespace) -> Pair:
    """Forward, backward and optimizer step of deep prompt tuning."""
    pair = Pair(f"deep prompt-tuning step of 4 x {SEQUENCE_TOKENS}", 1.0)
    remote = AutoDistributedModelForCausalLM.from_pretrained(
        path, tuning_mode="deep_ptune", pre_seq_len=NUM_PROMPT_TOKENS, **peers
    )
    trained = {name: p for name, p in remote.named_parameters() if p.requires_grad}
    first = next(
        p
        for name, p in trained.items()
        if name.endswith("prompt_embeddings.weight") and "intermediate" not in name
    )
    deep = next(p for name, p in trained.items() if "intermediate" in name)
    by_block = deep.detach().view(NUM_PROMPT_TOKENS, 30, -1).transpose(0, 1)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def at_home() -> Learner:
        local = DeepPrompts(base, first.detach(), by_block)
        return local, [local.first, local.deep]

    _learn(pair, options, (lambda ids: remote(ids, labels=ids).loss, _learning(remote)), at_home)
    return pair


def lora_steps(path: str, peers: dict[str, Any], options: argparse.Namespace) -> Pair:
    """Forward, backward and optimizer step of LoRA inside the blocks."""
    pair = Pair(f"LoRA step of 4 x {SEQUENCE_TOKENS}", 1.0)
    remote = AutoDistributedModelForCausalLM.from_pretrained(path, **peers)
    remote.add_adapter(LORA)
    with tempfile.TemporaryDirectory() as folder:
        remote.save_adapter(folder)

        def at_home() -> Learner:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            local: Any = PeftModel.from_pretrained(base, folder, is_trainable=True)
            return lambda ids: local(ids, labels=ids, use_cache=False).loss, _learning(local)

        swarm = (lambda ids: remote(ids, labels=ids).loss, _learning(remote))
        _learn(pair, options, swarm, at_home)
    return pair


Learner = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _learn(
    pair: Pair, options: argparse.Namespace, swarm: Learner, at_home: Callable[[], Learner]
) -> None:
    learners = [swarm, at_home(), at_home()]
    with torch.no_grad():
        for parameter in learners[2][1]:
            parameter += CONTROL_DISTANCE * torch.randn_like(parameter)
    optimizers = [torch.optim.Adam(parameters, lr=1e-3) for _, parameters in learners]

    def step(who: int, ids: Tensor) -> float:
        loss = learners[who][0](ids)
        loss.backward()
        optimizers[who].step()
        optimizers[who].zero_grad()
        return float(loss)

    for index in range(options.rounds + 1):
        ids = _ids(4, index)
        theirs, seconds = _timed(lambda ids=ids: step(0, ids))
        ours, local_seconds = _timed(lambda ids=ids: step(1, ids))
        _note(pair, index, seconds, local_seconds, abs(theirs - ours))
        pair.control.append(abs(step(2, ids) - ours))


def kept_bytes_per_token(
    path: str, peers: dict[str, Any], swarm: LocalSwarm, options: argparse.Namespace
) -> list[float]:
    """KB that each server's memory grows by for a training token between forward and backward."""
    remote = AutoDistributedModelForCausalLM.from_pretrained(
        path, tuning_mode="deep_ptune", pre_seq_len=NUM_PROMPT_TOKENS, **peers
    )
    ids = _ids(4, 0)
    num_tokens = 4 * (SEQUENCE_TOKENS + NUM_PROMPT_TOKENS)
    processes = [psutil.Process(server.pid) for server in swarm.servers]
    losses, growth = [], []
    before = [process.memory_info().rss for process in processes]
    for _ in range(4):
        losses.append(remote(ids, labels=ids).loss)
    after = [process.memory_info().rss for process in processes]
    for low, high in zip(before, after):
        growth.append((high - low) / (4 * num_tokens) / 1e3)
    for loss in losses:
        loss.backward()
    return growth


def _ids(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (rows, SEQUENCE_TOKENS), generator=generator)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _note(pair: Pair, index: int, swarm: float, local: float, difference: float) -> None:
    pair.differences.append(difference)
    if index:
        pair.swarm.append(swarm)
        pair.local.append(local)
    print(f"{pair.name}, round {index}: swarm {swarm:.2f} s, local {local:.2f} s", flush=True)


def report(options: argparse.Namespace, pairs: list[Pair], memory: list[float]) -> str:
    """The result file."""
    lines = [f"# Training, {datetime.date.today()}", ""]
    lines += [
        f"- {pair.name}: **{pair.ratio:.2f}** times local speed (aim {pair.aim}); results differ "
        f"by {max(pair.differences):.1e} at most{_controlled(pair)}"
        for pair in pairs
    ]
    lines += [
        f"- memory a server takes for a training token between forward and backward, for its "
        f"{30 // options.servers} blocks: {', '.join(f'{value:.0f}' for value in memory)} KB",
        "",
        "| what | where | median s | quartiles |",
        "| --- | --- | ---: | ---: |",
        *(row for pair in pairs for row in pair.rows()),
        "",
        f"{options.rounds} rounds after a warm-up, SmolLM2-135M in f32, {options.servers} servers "
        f"of one thread, {NUM_PROMPT_TOKENS} prompt tokens, LoRA of rank {LORA.r} on q and v.",
        describe_machine(),
        "",
    ]
    return "\n".join(lines)


def _controlled(pair: Pair) -> str:
    if not pair.control:
        return ""
    return (
        f" ({pair.differences[0]:.1e} before the first step), those of two runs at home that begin "
        f"{CONTROL_DISTANCE:.0e} apart by {max(pair.control):.1e}"
    )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = measure(options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
