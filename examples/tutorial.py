"""What the tutorials share: options, a swarm to use, texts to train on, a chart and a record."""

import argparse
import bz2
import csv
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from petals.demo.data import get_demo_data
from petals.demo.model import get_demo_model
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.types import BlockSpan

Review = tuple[str, int]
"""Text, and 1 if it praises the film."""


def read_options(description: str) -> argparse.Namespace:
    """What the command line says; in a notebook, the defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="repository or folder; default: the demo model")
    parser.add_argument("--join", help="address of a swarm; default: three servers started here")
    parser.add_argument("--data", help='a file of your own, or "hub"; default: the demo data')
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--result", type=Path, help="write the numbers into this markdown file")
    in_notebook = "ipykernel" in sys.modules
    options = parser.parse_args([] if in_notebook else None)
    options.model = options.model or str(get_demo_model("smollm2", say=print))
    torch.set_num_threads(1)  # the servers need the other cores
    torch.manual_seed(0)
    return options


@contextmanager
def swarm_of(options: argparse.Namespace, num_blocks: int) -> Iterator[list[str]]:
    """Addresses of the swarm to use: the one named, or three servers of one thread each."""
    if options.join:
        yield [options.join]
        return
    cuts = [round(num_blocks * part / 3) for part in range(4)]
    spans = tuple(BlockSpan(start, end) for start, end in zip(cuts, cuts[1:]))
    config = LocalSwarmConfig(model=options.model, spans=spans, dtype="float32", num_threads=1)
    with LocalSwarm(config, say=print) as swarm:
        yield list(swarm.initial_peers)


def load_reviews(source: str | None) -> tuple[list[Review], list[Review]]:
    """(to train on, held out), shuffled; no film is in both.

    source: None for the demo data, "hub" for SST-2, else a CSV file with the columns category
    (fresh or rotten), text and movie_name.
    """
    if source == "hub":
        from datasets import load_dataset

        parts = load_dataset("nyu-mll/glue", "sst2")
        train, test = (
            [(row["sentence"].strip(), row["label"]) for row in parts[name]]
            for name in ("train", "validation")
        )
    else:
        path = Path(source) if source else get_demo_data("reviews", say=print)
        if path.is_dir():
            (path,) = path.glob("*.csv.bz2")
        opened = bz2.open if path.suffix == ".bz2" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["category"] != "plot"]
        films = sorted({row["movie_name"] for row in rows})
        held_out = set(films[::5])
        train, test = (
            [
                (row["text"].strip(), int(row["category"] == "fresh"))
                for row in rows
                if (row["movie_name"] in held_out) == is_test
            ]
            for is_test in (False, True)
        )
    for part in (train, test):
        random.Random(0).shuffle(part)
    return train, test


def load_dialogues(source: str | None) -> list[tuple[str, str]]:
    """Pairs of what somebody says and what the persona answers, each once, shuffled.

    source: None for the demo data, else a YAML file with lists of lines under ``conversations``.
    """
    paths = [Path(source)] if source else _talk_of_a_machine()
    conversations = [
        [str(line) for line in lines]
        for path in paths
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    ]
    pairs = sorted({(lines[0], lines[1]) for lines in conversations if len(lines) > 1})
    random.Random(0).shuffle(pairs)
    return pairs


def _talk_of_a_machine() -> list[Path]:
    folder = get_demo_data("dialogues", say=print)
    topics = ("ai", "botprofile", "emotion", "food", "gossip", "greetings", "money", "psychology")
    return [folder / f"{topic}.yml" for topic in topics]


def chart(values: list[float], width: int = 60, height: int = 8) -> str:
    """A curve in characters: means of neighbours where there are more values than columns."""
    size = max(1, -(-len(values) // width))
    means = [
        sum(values[first : first + size]) / len(values[first : first + size])
        for first in range(0, len(values), size)
    ]
    low, high = min(means), max(means)
    step = (high - low) / (height - 1) or 1.0
    levels = [round((value - low) / step) for value in means]
    lines = [
        f"{low + level * step:8.3f} |" + "".join("*" if have == level else " " for have in levels)
        for level in reversed(range(height))
    ]
    return "\n".join([*(line.rstrip() for line in lines), " " * 9 + "+" + "-" * len(means)])


class AtHome(nn.Module):
    """Deep prompt tuning of a whole local model, by hand, to compare with: hooks, no Petals.

    ``prompts`` [P, H] come before the embeddings, ``deep`` [layers, P, H] are added to the same
    places on entering each layer. For batches padded on the right.
    """

    def __init__(self, model: nn.Module, prompts: Tensor, deep: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompts = nn.Parameter(prompts.detach().clone())
        self.deep = nn.Parameter(deep.detach().clone())
        for number, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)

    def _hook(self, number: int) -> Callable[..., tuple[tuple[Tensor, ...], dict[str, object]]]:
        def add(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> tuple:
            num = len(self.prompts)
            states = args[0]
            first = states[:, :num] + self.deep[number]
            return (torch.cat([first, states[:, num:]], dim=1), *args[1:]), kwargs

        return add

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Final hidden states [rows, tokens, H], those of the prompts left out."""
        rows, num = len(input_ids), len(self.prompts)
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = torch.cat([self.prompts.expand(rows, -1, -1), embeds], dim=1)
        mask = torch.cat([attention_mask.new_ones(rows, num), attention_mask], dim=1)
        output = self.model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return output.last_hidden_state[:, num:]


class Record:
    """Says what happens as it happens, and keeps what belongs into the result."""

    def __init__(self, title: str) -> None:
        self.started = time.monotonic()
        self.lines = [f"# {title}", ""]

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def keep(self, text: str) -> None:
        self.say(text)
        self.lines.append(f"- {text}")

    def block(self, text: str) -> None:
        print(text, flush=True)
        self.lines += ["", "```", text, "```", ""]

    def write(self, path: Path | None) -> None:
        self.keep(f"{time.monotonic() - self.started:.0f} s in all, on {platform.machine()}")
        if path is not None:
            path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
