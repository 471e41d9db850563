"""How long a generation pauses when relays end their circuits under it.

    make bench RUN="circuits.py --out benchmarks/results/circuits_<where>.md"

Two servers and a client behind symmetric NATs, through which nothing is punched, and a single
member that can be dialled. Nobody confirms that it can, so its daemon keeps to go-libp2p's own
limits: 128 KiB and two minutes for a circuit, where others allow 4 GiB and 30 minutes. So circuits
end all the time. It runs in a network laboratory: root and /dev/net/tun.
"""

import argparse
import datetime
import logging
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from machine import describe_machine
from netlab import Host, NetLab, Topology
from petals import AutoDistributedModelForCausalLM
from petals.testing.equality import assert_same_tokens
from petals.testing.tiny_models import PUBLISHED, write_tiny_model
from real_world import BOOT, CLIENT, SUBNET, World
from token_times import TokenTimes

ENV_LAB = "CIRCUITS_LAB"
NUM_BLOCKS, WIDTH = 4, 256
SPANS = {(0, 2): ("one",), (2, 4): ("two",)}
RTT_MS = 10


def main() -> None:
    """Parse, measure, print, write."""
    options = _options()
    if ENV_LAB not in os.environ:
        with NetLab(_topology()) as lab:
            words = [sys.executable, *sys.argv]
            lab.run(CLIENT, words, env={**os.environ, ENV_LAB: lab.name}, check=True)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="circuits-") as name:
        folder = Path(name)
        layout = {"num_hidden_layers": NUM_BLOCKS, "hidden_size": WIDTH}
        path = write_tiny_model(folder / "model", "bloom", layout=PUBLISHED["bloom"], **layout)
        with World(NetLab.attach(os.environ[ENV_LAB]), folder, path, SPANS) as world:
            text = measure(world, path, options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def _topology() -> Topology:
    nats = {BOOT: "none", CLIENT: "symmetric", "one": "symmetric", "two": "symmetric"}
    hosts = [Host(name, up="100mbit", down="100mbit", nat=nat) for name, nat in nats.items()]
    return Topology(tuple(hosts), rtt_ms=RTT_MS, subnet=SUBNET)


class StreamEvents(logging.Handler):
    """Counts, in the client's log, the streams that were opened again and the edges that broke."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.num_reopened = 0
        self.num_detours = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num_reopened += "was opened anew" in record.msg
        self.num_detours += "goes through the client" in record.msg


def measure(world: World, path: Path, options: argparse.Namespace) -> str:
    """One generation; the result file. Raises if its tokens are not the local model's."""
    times, events = TokenTimes(), StreamEvents()
    ids = torch.arange(8).unsqueeze(0) % 90 + 3
    plan = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    local = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = local.generate(ids, **plan)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(path), initial_peers=[world.address], dtype=torch.float32, show_route=False
    )
    logger = logging.getLogger("petals.client.session")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(events)
    with model.inference_session(max_length=ids.shape[1] + options.tokens) as session:
        tokens = model.generate(ids, streamer=times, **plan)
        repairs = session.trace.repairs
    assert_same_tokens(local, expected[0], tokens[0])
    gaps = sorted(times.gaps[1:])
    milliseconds = [f"{1e3 * gap:.0f}" for gap in (median(gaps), gaps[-len(gaps) // 20], gaps[-1])]
    lines = [
        f"# Circuits that end, {datetime.date.today()}",
        "",
        f"{options.tokens} tokens, the same as those of the local model, in "
        f"{sum(times.gaps):.0f} s. Streams of the client that broke and were opened anew: "
        f"{events.num_reopened}; broken edges between the servers, each through the client for "
        f"30 s: {events.num_detours}; servers given up: {len(repairs)}.",
        "",
        "| ms between two tokens | median | p95 | max |",
        "| --- | ---: | ---: | ---: |",
        f"| | {' | '.join(milliseconds)} |",
        "",
        f"All traffic of two servers and a client, each behind a symmetric NAT, through one relay "
        f"that ends a circuit after 128 KiB in a direction and after two minutes; {RTT_MS} ms "
        f"between all, {WIDTH} values a token in f32. {describe_machine()}",
        "",
    ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
