"""What happens to machines that people carry about: they sleep, are started again, and differ.

Knows processes; knows no tensors.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from chaos.cluster import Cluster, free_port
from petals.testing.local_swarm import LocalServer
from petals.types import BlockSpan

SLEEP_SECONDS = 40.0
"""Longer than the idle timeout of QUIC (30 s), the life of a record and the lease of a session
under test.
"""

BACK_SECONDS = 60.0
"""Time limit for everything to be back after such a fault."""

SERVER_OPTIONS = ("--quic", "--announce-every", "5", "--announce-for", "15")
"""QUIC beside TCP, and records that expire during a sleep."""

_WITHOUT_VECTORS = {"ATEN_CPU_CAPABILITY": "default"}
"""Kernels without vector instructions, as on a processor that has none."""

_OTHER_THREADS = ("--threads", "2")

NUM_RESTARTS = 5


def sleep_command(groups: Sequence[int], alone: Sequence[int]) -> list[str]:
    """A command that stops process groups and processes and wakes them after ``SLEEP_SECONDS``."""
    targets = " ".join([*(f"-{group}" for group in groups), *map(str, alone)])
    script = f"kill -STOP -- {targets}; sleep {SLEEP_SECONDS:g}; kill -CONT -- {targets}"
    return ["/bin/sh", "-c", script]


def add_on_other_hardware(cluster: Cluster, blocks: BlockSpan) -> None:
    """A server whose sums are rounded in another order than those of the others."""
    cluster.add_with_options(blocks, _OTHER_THREADS, _WITHOUT_VECTORS)


def restart_five_times(cluster: Cluster, victim: LocalServer, *, has_identity: bool) -> None:
    """Kill a server's process alone, as a user or the kernel does, and start it again at once.

    Its network daemon ends by itself. With an identity the peer id, the address and the port stay.
    """
    options: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        if has_identity:
            key = Path(folder) / "server.key"
            options = ("--identity", str(key), "--port", str(free_port()))
        for _ in range(NUM_RESTARTS):
            cluster.kill_alone(victim)
            (victim,) = cluster.add_with_options(victim.blocks, options)
            time.sleep(1.0)
