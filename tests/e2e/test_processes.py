"""Programs that end with an open session, fork, or start workers.

Each ends within seconds, frees what it held on the servers, leaves no process and no folder behind,
and every process of it generates the tokens of the local model.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from petals.client.connection.event_loop import client_loop
from petals.swarm.node import NodeConfig, SwarmNode
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from petals.wire.replies import Info
from petals.wire.requests import GetInfo
from support import process_shapes as shapes

pytestmark = pytest.mark.slow

PROGRAM_SECONDS = 150.0
"""Time limit for a whole program; imports take most of it on a loaded machine."""

END_SECONDS = 10.0
"""Time limit from the last line of a script to the end of its process, of which 5 s are the limit
for the network daemon."""

FREE_SECONDS = 5.0
"""Time limit for servers to have freed what an ended process held; a lease is 60 s."""


@dataclass
class World:
    """A swarm of two servers, and a member that asks them what they hold."""

    swarm: LocalSwarm
    folder: Path
    expected: list[int]
    node: SwarmNode

    async def num_sessions(self) -> int:
        total = 0
        for server in self.swarm.servers:
            async with await self.node.open_channel(server.peer_id, "blocks") as channel:
                total += (await channel.request(GetInfo(), expect=Info, timeout=5.0))[
                    0
                ].num_sessions
        return total

    def await_free(self) -> None:
        """Return once no server has a session."""
        deadline = time.monotonic() + FREE_SECONDS
        while num_left := client_loop.run(self.num_sessions(), timeout=30.0):
            assert time.monotonic() < deadline, f"{num_left} sessions are not freed"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=4)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([shapes.PROMPT])
    expected = local.generate(ids, max_new_tokens=shapes.NUM_NEW, do_sample=False)[0].tolist()
    config = LocalSwarmConfig(
        model=str(folder),
        spans=(BlockSpan(0, 2), BlockSpan(2, 4)),
        dtype="float32",
        num_threads=1,
    )
    with LocalSwarm(config) as swarm:
        node = SwarmNode(NodeConfig(initial_peers=swarm.initial_peers, client_mode=True))
        client_loop.run(node.__aenter__())
        try:
            yield World(swarm, folder, expected, node)
        finally:
            client_loop.run(node.close())


@dataclass
class Ended:
    """A program that has ended. ``lines``: what its processes said, as [kind, value, time]."""

    status: int
    lines: list[list[object]]
    errors: str
    end_seconds: float
    """From its last line to its end."""

    def said(self, kind: str) -> list[object]:
        return [value for said, value, _ in self.lines if said == kind]


def run_program(world: World, shape: Callable[..., object], temp: Path) -> Ended:
    words = [sys.executable, "-m", "support.process_shapes", shape.__name__]
    paths = [str(Path(shapes.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TMPDIR": str(temp), "PYTHONPATH": os.pathsep.join(paths)}
    output, errors = temp / "output", temp / "errors"
    with output.open("wb") as out, errors.open("wb") as err:
        program = subprocess.Popen(
            [*words, str(world.folder), *world.swarm.initial_peers],
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
        try:
            status = program.wait(PROGRAM_SECONDS)
            ended = time.time()
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait(10.0)
            raise AssertionError(f"hangs: {output.read_text()}\n{errors.read_text()}") from None
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return Ended(status, lines, errors.read_text(), ended - lines[-1][2] if lines else 0.0)


def daemons_in(folder: Path) -> list[str]:
    """Command lines of the network daemons whose sockets are below ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "p2pd" in words and str(folder) in words:
            found.append(words)
    return found


@pytest.fixture
def temp() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="pl-") as folder:
        yield Path(folder)


def check(world: World, ended: Ended, temp: Path, *, num_calls: int, status: int = 0) -> None:
    report = f"{ended.lines}\n{ended.errors}"
    assert ended.status == status, report
    assert ended.said("tokens") == [world.expected] * num_calls, report
    assert ended.end_seconds < END_SECONDS, report
    assert not set(ended.said("child ended")) - {0} and not ended.said("child hangs"), report
    assert not daemons_in(temp), report
    assert not list(temp.glob("petals-*")), report
    for noise in ("Exception ignored", "destroyed but it is pending", "never awaited", "Warning"):
        assert noise not in ended.errors, report
    world.await_free()


ENDINGS = {
    shapes.end_of_script: (1, 0),
    shapes.system_exit: (1, 3),
    shapes.exception: (1, 1),
    shapes.suspended_generator: (1, 0),
    shapes.generator_in_a_cycle: (1, 0),
    shapes.generator_beside_a_thread: (1, 0),
    shapes.daemon_thread_in_generate: (1, 0),
    shapes.thread_in_generate: (2, 0),
    shapes.atexit_of_the_user: (1, 0),
}
"""Calls that end with tokens, and the program's exit status."""

CHILDREN = {
    shapes.fork_and_exit: 4,
    shapes.fork_and_os_exit: 4,
    shapes.fork_and_collect: 2,
    shapes.fork_and_generate: 6,
    shapes.fork_between_passes: 1,
    shapes.preload: 5,
    shapes.preload_after_use: 14,
    shapes.multiprocessing_fork: 6,
    shapes.multiprocessing_spawn: 4,
    shapes.multiprocessing_forkserver: 4,
    shapes.popen: 2,
    shapes.data_loader: 20,
    shapes.data_loader_in_a_session: 2,
}
"""Calls that end with tokens, of all processes together."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", ENDINGS, ids=lambda shape: shape.__name__)
def test_the_interpreter_ends_with_an_open_session(
    world: World, temp: Path, shape: Callable[..., object]
) -> None:
    num_calls, status = ENDINGS[shape]
    ended = run_program(world, shape, temp)
    check(world, ended, temp, num_calls=num_calls, status=status)
    assert len(ended.said("refused")) == (shape is shapes.atexit_of_the_user)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", CHILDREN, ids=lambda shape: shape.__name__)
def test_children_use_the_model_and_the_parent_does_not_notice(
    world: World, temp: Path, shape: Callable[..., object]
) -> None:
    ended = run_program(world, shape, temp)
    check(world, ended, temp, num_calls=CHILDREN[shape])
    refusals = ended.said("refused")
    expected = {
        shapes.fork_and_generate: "SessionClosed",
        shapes.data_loader_in_a_session: "SessionClosed",
        shapes.fork_between_passes: "NotSupported",
    }
    assert {name for name, _ in refusals} == ({expected[shape]} if shape in expected else set())
    assert all("forked" in text for _, text in refusals)
