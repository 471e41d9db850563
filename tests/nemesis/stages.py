"""The swarms that are tormented: which models, cut into which spans."""

from contextlib import ExitStack
from pathlib import Path

from nemesis.arena import BOOTSTRAP_HOST, CLIENT_HOST, NUM_LAB_HOSTS, Arena
from nemesis.netlab import NetLab
from nemesis.play import Director
from petals.demo.model import get_demo_model
from petals.testing.local_swarm import LocalSwarmConfig
from petals.testing.tiny_models import PUBLISHED, write_tiny_model
from petals.types import BlockSpan

SPANS = {
    "bloom": (BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(4, 5)),
    "smollm2": (BlockSpan(0, 10), BlockSpan(10, 20), BlockSpan(20, 30)),
}
SCALES = {"bloom": 2, "smollm2": 1}
LAB_HOSTS = (CLIENT_HOST, BOOTSTRAP_HOST, *(f"s{n}" for n in range(1, NUM_LAB_HOSTS + 1)))


def model_folder(name: str, folder: Path) -> Path:
    """The checkpoint: a demo model, or a random tiny one written into ``folder``."""
    if name == "smollm2":
        return get_demo_model(name)
    return write_tiny_model(folder / name, name, layout=PUBLISHED[name], num_hidden_layers=5)


def open_director(
    name: str,
    stack: ExitStack,
    *,
    folder: Path,
    spares: tuple[BlockSpan, ...] | None = None,
    lab: NetLab | None = None,
) -> Director:
    """A director with its swarm online; both end with ``stack``.

    ``spares`` are the spans with a second holder; by default all.
    """
    source = model_folder(name, folder)
    config = LocalSwarmConfig(
        model=str(source),
        dtype="float32",
        num_threads=1,
        server_options=("--check-integrity",),
    )
    spans = SPANS[name] + (SPANS[name] if spares is None else spares)
    arena = stack.enter_context(Arena(config, spans, lab))
    return Director(name, source, arena, SCALES[name])
