"""The models under test and the spans that they are cut into."""

from contextlib import ExitStack
from pathlib import Path

from chaos.cluster import Cluster
from chaos.leak_checks import LEASE_SECONDS
from chaos.moving_host import MovingHost
from chaos.runner import Runner
from netlab import NetLab
from petals.demo.model import get_demo_model
from petals.testing.local_swarm import LocalSwarmConfig
from petals.testing.tiny_models import PUBLISHED, write_tiny_model
from petals.types import BlockSpan

SPANS = {
    "bloom": (BlockSpan(0, 2), BlockSpan(2, 4), BlockSpan(4, 5)),
    "smollm2": (BlockSpan(0, 10), BlockSpan(10, 20), BlockSpan(20, 30)),
}
NUM_HOPS = 3

SCALES = {"bloom": 2, "smollm2": 1}
"""Factor of the number of tokens: a step of the larger model takes longer."""


def open_runner(
    name: str,
    stack: ExitStack,
    *,
    folder: Path,
    lab: NetLab | None = None,
    options: tuple[str, ...] = (),
    moving: MovingHost | None = None,
) -> Runner:
    """A runner with its cluster online, two servers for each span; both end with ``stack``.

    ``folder`` is for a tiny model's checkpoint and the bootstrap peer's identity. ``options`` are
    added to the servers' own. ``moving``: a host on which some of them are started.
    """
    if name == "smollm2":
        source = get_demo_model(name)
    else:
        layout = PUBLISHED[name]
        source = write_tiny_model(folder / name, name, layout=layout, num_hidden_layers=5)
    config = LocalSwarmConfig(
        model=str(source),
        spans=2 * SPANS[name],
        dtype="float32",
        num_threads=1,
        server_options=("--check-integrity", "--lease", str(LEASE_SECONDS), *options),
    )
    cluster = stack.enter_context(Cluster(config, folder, lab, moving))
    return Runner(source, cluster, SCALES[name])
