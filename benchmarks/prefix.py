"""What a shared prefix costs: run again, forked on the servers, or continued from a recording.

Two servers in this process, over a network in memory, of a model with random weights:

    python benchmarks/prefix.py --tokens 512
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from petals.testing.in_process_swarm import InProcessSwarm
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
NUM_BLOCKS = 8
NUM_QUESTION_TOKENS = 8


def measure(model: PreTrainedModel, num_tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way to the logits of a question after a prefix."""
    prefix = torch.randint(3, 90, (1, num_tokens))
    question = torch.randint(3, 90, (1, NUM_QUESTION_TOKENS))
    whole = torch.cat([prefix, question], dim=1)
    shared = model(prefix, use_cache=True).past_key_values

    def forked() -> None:
        with copy.deepcopy(shared) as own:
            model(question, past_key_values=own)

    def loop(**first: bool) -> None:
        with model(prefix, **first).past_key_values as cache:
            model(question, past_key_values=cache)

    ways: dict[str, Callable[[], object]] = {
        "whole sequence": lambda: model(whole, use_cache=False),
        "copy.deepcopy(prefix), question": forked,
        "copy.deepcopy(prefix) alone": lambda: copy.deepcopy(shared).close(),
        "loop, session opened at once (use_cache=True)": lambda: loop(use_cache=True),
        "loop, session opened when continued (default)": loop,
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        found[name] = statistics.median(seconds[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prefix")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    half = NUM_BLOCKS // 2
    with tempfile.TemporaryDirectory() as parent:
        sizes = {"num_hidden_layers": NUM_BLOCKS, "max_position_embeddings": 4096} | SIZES
        folder = write_tiny_model(Path(parent), "llama", **sizes)
        spans = BlockSpan(0, half), BlockSpan(half, NUM_BLOCKS)
        with InProcessSwarm(folder, *spans) as swarm, torch.inference_mode():
            for name, seconds in measure(swarm.model(), args.tokens, args.repeats).items():
                print(f"{name:48} {1000 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
