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
    BootstrapFailed,
    CacheFull,
    LengthExceeded,
    MissingBlocksError,
    PetalsError,
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


def generate(model: PreTrainedModel, num_tokens: int = 2) -> None:
    model.generate(PROMPT, max_new_tokens=num_tokens)


@pytest.mark.parametrize(
    ("error", "match", "ask"),
    [
        (MissingBlocksError, "0:4 of lonely", lambda world: generate(world.model(world.lonely))),
        (BootstrapFailed, "tcp/9", lambda world: generate(world.model(initial_peers=[NOBODY]))),
        (AdmissionDenied, "swarm", lambda world: generate(world.model(swarm_key=world.other_key))),
        (AdmissionDenied, "swarm", lambda world: generate(world.model(swarm_key=None))),
        (LengthExceeded, "64 tokens, not 65", lambda world: generate(world.model(), 63)),
    ],
)
def test_what_cannot_be_done_is_told_in_time(
    world: World, error: type[PetalsError], match: str, ask: Callable[[World], object]
) -> None:
    with refused(error, match):
        ask(world)


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


GARBAGE = {
    "random": os.urandom(4096),
    "huge": frames.encode_header(FrameKind.MESSAGE, 2**32 - 1),
    "noise": frames.encode_frame(FrameKind.MESSAGE, os.urandom(300)),
    "no hello": frames.encode_frame(FrameKind.MESSAGE, encode_message(GetInfo())),
    "chunk": frames.encode_frame(FrameKind.CHUNK, bytes(1000)),
    "forged": frames.encode_frame(FrameKind.MESSAGE, encode_message(Hello(1, "blocks", b"forged"))),
    "version": frames.encode_frame(FrameKind.MESSAGE, encode_message(Hello(2, "blocks"))),
}
"""What a peer that is no Petals, or a hostile one, may send to a server first."""

GARBAGE_OF_MEMBERS = (
    os.urandom(4096),
    frames.encode_header(FrameKind.CHUNK, 2**31),
    frames.encode_frame(FrameKind.MESSAGE, b"\xdd\xff\xff\xff\xff"),
    frames.encode_frame(FrameKind.CREDIT, b"\xff" * 4) * 64,
)


def test_without_a_greeting_only_a_refusal_comes_back(world: World) -> None:
    answers = client_loop.run(_strangers(world))
    for name, refusals in answers.items():
        assert [type(refusal) for refusal in refusals] in ([Refusal], []), name
        for refusal in refusals:
            assert refusal.code in ("protocol", "admission_denied", "version_mismatch"), name
            assert refusal.message
            assert refusal.hint or refusal.code == "protocol", name


async def _strangers(world: World) -> dict[str, list[Refusal]]:
    """The answers to each kind of garbage until the server ends the stream."""
    async with SwarmNode(NodeConfig(client_mode=True, host="127.0.0.1")) as stranger:
        await stranger.transport.connect(world.peers[0])
        await stranger.transport.connect(_address(world))

        async def talk(garbage: bytes) -> list[Refusal]:
            stream = await stranger.transport.open_stream(_first(world), STREAM_PROTOCOL, 5.0)
            stream.write(garbage)
            return await messages_until_end(stream, SOON_SECONDS)

        # A message that breaks off has no answer; the stream is gone.
        broken_off = await stranger.transport.open_stream(_first(world), STREAM_PROTOCOL, 5.0)
        broken_off.write(frames.encode_header(FrameKind.MESSAGE, 1000) + b"cut off")
        await broken_off.close()
        return dict(zip(GARBAGE, await asyncio.gather(*map(talk, GARBAGE.values()))))


def test_members_that_send_garbage_lose_their_channels_only(world: World) -> None:
    async def send_all() -> None:
        numbered = enumerate(GARBAGE_OF_MEMBERS)
        await asyncio.gather(*(_send_within_a_session(world, way, i) for i, way in numbered))
        await world.until_at_rest(LEASE_SECONDS + SOON_SECONDS)

    client_loop.run(send_all())


async def _send_within_a_session(world: World, garbage: bytes, number: int) -> None:
    (info, *_) = await world.infos()
    header = RequestHeader(bytes([number]) * 16, 0)
    opening = OpenSession(header, info.model, (0, 2), 1, CACHE_TOKENS // 4, "float32")
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


@pytest.mark.parametrize("what", ["nobody serves", "pickle"])
def test_a_command_that_fails_says_why_and_what_to_type(
    world: World, tmp_path: Path, what: str
) -> None:
    """Exit status not 0, a sentence and a hint on stderr, no traceback, nothing on stdout."""
    if what == "pickle":
        shutil.copy(world.served / "config.json", tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        ended = command("serve", str(tmp_path), "--host", "127.0.0.1")
        status, sentence = 2, "only pickle weights"
    else:
        join = ("--join", world.peers[0], "--swarm-key", str(world.key_file))
        ended = command("generate", str(world.lonely), *join, "--prompt", "one two")
        status, sentence = 1, "Nobody serves blocks 0:4 of lonely"
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    error, _, rest = ended.stderr.partition("error: ")[2].partition("\nhint: ")
    hint, _, seconds = rest.partition("\nseconds: ")
    assert sentence in error
    assert hint
    assert float(seconds) < SOON_SECONDS
