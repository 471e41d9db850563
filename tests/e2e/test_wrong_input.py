"""Whatever a user, a client or a stranger gets wrong, against two real servers of a closed swarm.

Each test leaves the servers as it found them: alive, no session open, all of their cache free.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from petals import AutoDistributedModelForCausalLM
from petals.client.connection.event_loop import client_loop
from petals.errors import (
    AdmissionDenied,
    BadInput,
    BatchTooLarge,
    BootstrapFailed,
    CacheFull,
    LengthExceeded,
    MissingBlocksError,
    PetalsError,
    RequestTooLarge,
    UnknownAdapter,
)
from petals.swarm.identity import create_swarm_key
from petals.swarm.node import NodeConfig, SwarmNode
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId
from petals.wire import frames
from petals.wire.frames import FrameKind, encode_message
from petals.wire.handshake import Hello, Refusal
from petals.wire.header import RequestHeader
from petals.wire.replies import Info, SessionOpened
from petals.wire.requests import GetInfo, OpenSession
from support.raw_streams import (
    admitted_stream,
    encoded,
    messages_until_end,
    read_message,
)
from support.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.slow

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKjS9yJsQwDbD5oCqgKcKqEYvuQVvzJ3nSSBDeJXNbXhr"
NUM_BLOCKS, HIDDEN = 4, 32
CACHE_TOKENS = 64
"""Room for one session of this many tokens; also the longest one a server takes."""

LEASE_SECONDS = 1.0
SOON_SECONDS = 6.0
"""A client waits for a bootstrap peer that does not answer for 5 s."""
PROMPT = torch.tensor([[3, 4, 5]])


@dataclass
class World:
    """A closed swarm of a tiny model, and another model that nobody serves."""

    swarm: LocalSwarm
    key_file: Path
    other_key: Path
    """The key of another swarm."""

    served: Path
    lonely: Path
    node: SwarmNode
    """A member that does by hand what no client would."""

    @property
    def peers(self) -> list[str]:
        return list(self.swarm.initial_peers)

    def model(self, folder: Path | None = None, **options: object) -> PreTrainedModel:
        options = {"initial_peers": self.peers, "swarm_key": self.key_file} | options
        return AutoDistributedModelForCausalLM.from_pretrained(
            str(folder or self.served), dtype=torch.float32, **options
        )

    async def infos(self) -> list[Info]:
        found = []
        for server in self.swarm.servers:
            async with await self.node.open_channel(server.peer_id, "blocks") as channel:
                found.append((await channel.request(GetInfo(), expect=Info, timeout=5.0))[0])
        return found

    async def until_at_rest(self, seconds: float = SOON_SECONDS) -> None:
        """Return once no server has a session or a page in use."""
        async with asyncio.timeout(seconds):
            while True:
                if all(_at_rest(info) for info in await self.infos()):
                    return
                await asyncio.sleep(0.05)


def _at_rest(info: Info) -> bool:
    blocks = info.blocks[1] - info.blocks[0]
    return info.num_sessions == 0 and info.tokens_free == CACHE_TOKENS * blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("wrong")
    served = write_tiny_model(home / "tiny", "llama", num_hidden_layers=NUM_BLOCKS)
    write_tokenizer(served)
    lonely = Path(shutil.copytree(served, home / "lonely"))
    key_file = home / "swarm.key"
    key = create_swarm_key(key_file)
    create_swarm_key(home / "other.key")
    limits = ("--cache-tokens", CACHE_TOKENS, "--max-length", CACHE_TOKENS)
    config = LocalSwarmConfig(
        model=str(served),
        spans=(BlockSpan(0, 2), BlockSpan(2, NUM_BLOCKS)),
        dtype="float32",
        num_threads=1,
        swarm_key=key_file,
        server_options=tuple(map(str, (*limits, "--lease", LEASE_SECONDS))),
    )
    with LocalSwarm(config) as swarm:
        network = NodeConfig(initial_peers=swarm.initial_peers, swarm_key=key, client_mode=True)
        node = client_loop.run(_entered(network))
        try:
            yield World(swarm, key_file, home / "other.key", served, lonely, node)
        finally:
            client_loop.run(node.close())
            assert swarm.exited() == set()


async def _entered(config: NodeConfig) -> SwarmNode:
    return await SwarmNode(config).__aenter__()


@pytest.fixture(autouse=True)
def servers_live_on(world: World) -> Iterator[None]:
    """After each test the same two processes serve a right request and have all their pages."""
    yield
    assert world.swarm.exited() == set()
    client_loop.run(world.until_at_rest())


@pytest.fixture(scope="module")
def model(world: World) -> PreTrainedModel:
    return world.model(alloc_timeout=0.5)


@contextmanager
def refused(error: type[PetalsError], match: str = "") -> Iterator[None]:
    """The block ends with this error: a sentence that ``match`` is in, and a hint, in time."""
    began = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        yield
    assert time.monotonic() - began < SOON_SECONDS
    assert caught.value.message.endswith((".", ".)", "server)"))
    assert caught.value.hint


def generate(model: PreTrainedModel, num_tokens: int = 2, rows: int = 1) -> None:
    model.generate(PROMPT.expand(rows, -1), max_new_tokens=num_tokens)


@pytest.mark.parametrize(
    ("error", "match", "ask"),
    [
        (MissingBlocksError, "0:4 of lonely", lambda world: generate(world.model(world.lonely))),
        (BootstrapFailed, "tcp/9", lambda world: generate(world.model(initial_peers=[NOBODY]))),
        (AdmissionDenied, "swarm", lambda world: generate(world.model(swarm_key=world.other_key))),
        (AdmissionDenied, "swarm", lambda world: generate(world.model(swarm_key=None))),
        (UnknownAdapter, "poems", lambda world: generate(world.model(active_adapter="poems"))),
        (LengthExceeded, "64 tokens, not 65", lambda world: generate(world.model(), 63)),
        (BatchTooLarge, "256 rows", lambda world: generate(world.model(), rows=257)),
        # At once, whatever the client's patience: it can never fit.
        (RequestTooLarge, "in all", lambda world: generate(world.model(alloc_timeout=60.0), 61, 2)),
        (
            LengthExceeded,
            "64 tokens, not 65",
            lambda world: world.model().remote_blocks(torch.zeros(1, 65, HIDDEN)),
        ),
    ],
)
def test_what_cannot_be_done_is_told_in_time(
    world: World, error: type[PetalsError], match: str, ask: Callable[[World], object]
) -> None:
    with refused(error, match):
        ask(world)


def test_rows_that_are_too_much_together_go_one_after_the_other(model: PreTrainedModel) -> None:
    assert model.remote_blocks(torch.zeros(2, 64, HIDDEN)).shape == (2, 64, HIDDEN)


def test_a_step_longer_than_its_session_leaves_the_session_usable(model: PreTrainedModel) -> None:
    with model.inference_session(max_length=8) as session:
        with refused(LengthExceeded, "max_length=8"):
            session.step(torch.zeros(1, 9, HIDDEN))
        session.step(torch.zeros(1, 8, HIDDEN))


def test_a_full_cache_is_waited_for_and_then_told(world: World, model: PreTrainedModel) -> None:
    with world.model().inference_session(max_length=CACHE_TOKENS) as holder:
        holder.step(torch.zeros(1, 1, HIDDEN))
        began = time.monotonic()
        with refused(CacheFull, "cache|room"):
            model.generate(PROMPT, max_new_tokens=2)
        assert time.monotonic() - began >= 0.5
        # Both servers still have nothing but the holder.
        assert [info.num_sessions for info in client_loop.run(world.infos())] == [1, 1]
        holder.step(torch.zeros(1, 1, HIDDEN))
    assert model.generate(PROMPT, max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(1, 3, HIDDEN - 1),
        torch.zeros(1, 3, HIDDEN, dtype=torch.int64),
        torch.full((1, 3, HIDDEN), float("nan")),
        torch.full((1, 3, HIDDEN), float("inf")),
    ],
    ids=["width", "int64", "nan", "inf"],
)
def test_states_that_cannot_be(model: PreTrainedModel, hidden: torch.Tensor) -> None:
    with refused(BadInput, "[Hh]idden"):
        model.remote_blocks(hidden)
    with model.inference_session(max_length=8) as session:
        with refused(BadInput, "(?i)hidden states"):
            session.step(hidden)
        assert session.step(torch.zeros(1, 3, HIDDEN)).isfinite().all()


class TestBytes:
    """What a peer that is no Petals, or an evil one, may send to a server."""

    @pytest.mark.parametrize(
        "garbage",
        [
            os.urandom(4096),
            frames.encode_header(FrameKind.MESSAGE, 2**32 - 1),
            frames.encode_header(FrameKind.MESSAGE, 1000) + b"cut off",
            frames.encode_frame(FrameKind.MESSAGE, os.urandom(300)),
            frames.encode_frame(FrameKind.MESSAGE, encode_message(GetInfo())),
            frames.encode_frame(FrameKind.CHUNK, bytes(1000)),
            frames.encode_frame(FrameKind.MESSAGE, encode_message(Hello(1, "blocks", b"forged"))),
            frames.encode_frame(FrameKind.MESSAGE, encode_message(Hello(2, "blocks"))),
        ],
        ids=["random", "huge", "cut", "noise", "no hello", "chunk", "forged", "version"],
    )
    def test_without_a_greeting_only_a_refusal_comes_back(
        self, world: World, garbage: bytes
    ) -> None:
        answers = client_loop.run(self._talk(world, garbage))
        assert [type(answer) for answer in answers] in ([Refusal], [])
        for answer in answers:
            assert answer.code in ("protocol", "admission_denied", "version_mismatch")
            assert answer.message
            assert answer.hint or answer.code == "protocol"

    async def _talk(self, world: World, garbage: bytes) -> list[Refusal]:
        """The answers to ``garbage`` until the server ends the stream, which it does unless cut."""
        network = NodeConfig(client_mode=True, host="127.0.0.1")
        async with SwarmNode(network) as stranger:
            await stranger.transport.connect(world.peers[0])
            await stranger.transport.connect(_address(world))
            stream = await stranger.transport.open_stream(_first(world), STREAM_PROTOCOL, 5.0)
            stream.write(garbage)
            if garbage.endswith(b"cut off"):
                await stream.close()
                return []
            return await messages_until_end(stream, SOON_SECONDS)

    def test_members_that_go_mad_lose_their_channels_only(self, world: World) -> None:
        ways = (
            os.urandom(4096),
            frames.encode_header(FrameKind.CHUNK, 2**31),
            frames.encode_frame(FrameKind.MESSAGE, b"\xdd\xff\xff\xff\xff"),
            frames.encode_frame(FrameKind.CREDIT, b"\xff" * 4) * 64,
        )

        async def go_mad() -> None:
            await asyncio.gather(*(self._go_mad(world, way, i) for i, way in enumerate(ways)))
            await world.until_at_rest(LEASE_SECONDS + SOON_SECONDS)

        client_loop.run(go_mad())

    async def _go_mad(self, world: World, garbage: bytes, number: int) -> None:
        (info, *_) = await world.infos()
        session_id, length = bytes([number]) * 16, CACHE_TOKENS // 4
        header = RequestHeader(session_id, 0)
        opening = OpenSession(header, info.model, (0, 2), 1, length, "float32")
        stream = await admitted_stream(world.node, _first(world))
        stream.write(encoded(opening))
        assert isinstance(await read_message(stream), SessionOpened)
        stream.write(garbage)
        await messages_until_end(stream, SOON_SECONDS)


def _first(world: World) -> PeerId:
    return world.swarm.servers[0].peer_id


def _address(world: World) -> str:
    """Where the first server listens."""
    return next(a for a in world.swarm.servers[0].addresses if "/tcp/" in a)


VANISHING = """
import sys, time, torch
from petals import AutoDistributedModelForCausalLM
folder, key, *peers = sys.argv[1:]
model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=peers, swarm_key=key)
with model.inference_session(max_length=64) as session:
    session.step(torch.zeros(1, 5, 32))
    print("holding", flush=True)
    time.sleep(600)
"""


def test_a_client_that_is_killed_is_forgotten_when_its_lease_ends(world: World) -> None:
    arguments = (str(world.served), str(world.key_file), *world.peers)
    client = subprocess.Popen(
        [sys.executable, "-c", VANISHING, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None and client.stdout.readline() == "holding\n"
        # Signs of life keep an idle session beyond its lease.
        time.sleep(1.5 * LEASE_SECONDS)
        held = client_loop.run(world.infos())
        assert [(info.num_sessions, info.tokens_free) for info in held] == [(1, 0), (1, 0)]
    finally:
        client.kill()
        client.wait()
    client_loop.run(world.until_at_rest(LEASE_SECONDS + SOON_SECONDS))
    world.model().generate(PROMPT, max_new_tokens=CACHE_TOKENS - 3)


TIMED = """
import sys, time
import transformers
import petals.cli.main, petals.client.model.auto, petals.server.server, petals.swarm.libp2p.engine
began = time.monotonic()
try:
    petals.cli.main.main()
finally:
    print(f"seconds: {time.monotonic() - began}", file=sys.stderr)
"""
"""The command `petals`; its clock starts when Python has read the libraries."""


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PETALS_")}
    return subprocess.run(
        [sys.executable, "-c", TIMED, *arguments],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestCommands:
    """Exit status not 0, a sentence and a hint on stderr, no traceback, nothing on stdout."""

    def fails(self, *arguments: str, status: int, said: str) -> None:
        ended = command(*arguments)
        assert ended.returncode == status, ended.stderr
        assert ended.stdout == ""
        assert "Traceback" not in ended.stderr
        error, _, rest = ended.stderr.partition("error: ")[2].partition("\nhint: ")
        hint, _, seconds = rest.partition("\nseconds: ")
        assert said in error
        assert hint
        assert float(seconds) < SOON_SECONDS

    def test_generate_with_a_model_nobody_serves(self, world: World) -> None:
        join = ("--join", world.peers[0], "--swarm-key", str(world.key_file))
        arguments = ("generate", str(world.lonely), *join, "--prompt", "one two")
        self.fails(*arguments, status=1, said="Nobody serves blocks 0:4 of lonely")

    def test_serve_with_pickled_weights(self, world: World, tmp_path: Path) -> None:
        shutil.copy(world.served / "config.json", tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        arguments = ("serve", str(tmp_path), "--host", "127.0.0.1")
        self.fails(*arguments, status=2, said="only pickle weights")
