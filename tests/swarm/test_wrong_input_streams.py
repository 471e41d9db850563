"""Random and broken bytes at a server that holds sessions: pages come back, others go on."""

import asyncio
import random

import msgspec
import pytest
import torch

from petals.errors import VersionMismatch
from petals.server.config import ClientLimits
from petals.swarm.rpc.dispatcher import STREAM_PROTOCOL
from petals.swarm.transport import Stream
from petals.testing.manual_clock import settle
from petals.wire import frames
from petals.wire.fields import Message
from petals.wire.frames import FrameKind
from petals.wire.handshake import Hello
from petals.wire.header import RequestHeader
from petals.wire.passes import Forward
from petals.wire.replies import SessionOpened
from petals.wire.requests import (
    BeginEpoch,
    CloseSession,
    GetInfo,
    KeepSession,
    OpenSession,
    ReplayPart,
    ReplayRequest,
    Step,
)
from support.models import WIDTH
from support.raw_streams import admitted_stream, encoded, messages_until_end, read_message
from support.reference import assert_close, states
from support.service import Served, served, split

LEASE_SECONDS = 0.1
DOOR = ClientLimits(lease_seconds=LEASE_SECONDS)


async def still_right(swarm: Served) -> None:
    talk, text = await swarm.talk(), states(6, seed=3)
    await talk.open()
    (output,) = await talk.step(0, [0], [text])
    assert_close(output, swarm.expected(text))
    await talk.close()
    await swarm.at_rest()


def a_message(dice: random.Random) -> tuple[Message, torch.Tensor | None]:
    """One that can be decoded, and may mean anything."""
    session = dice.choice([b"s" * 16, b"t" * 16])
    blocks = dice.choice([(10, 14), (11, 13), (14, 10), (0, 2**31 - 1)])
    rows, count = dice.choice([0, 1, 2, 9]), dice.choice([0, 1, 3, 300])
    dtype = dice.choice([torch.float32, torch.float16, torch.int64, torch.bool])
    hidden = torch.zeros(rows * count, dice.choice([0, WIDTH - 1, WIDTH]), dtype=dtype)
    match dice.randrange(7):
        case 0 | 1:
            length = dice.choice([0, 1, 64, 2**31 - 1])
            seconds = dice.choice([0.0, 0.01])
            epoch = dice.choice([0, 1, 2**53])
            return OpenSession(
                RequestHeader(session, epoch),
                dice.choice(["tiny", ""]),
                blocks,
                max(1, rows),
                length,
                dice.choice(["float32", "bool"]),
                None,
                seconds,
            ), None
        case 2:
            reorder = dice.choice([None, (0,), (7,), (0,) * 9])
            starts = (dice.choice([0, 3, 2**31 - 1]),) * rows
            header = RequestHeader(session, dice.choice([0, 0, 1]), dice.randrange(4))
            return Step(header, starts, (count,) * rows, reorder), hidden
        case 3:
            return Forward("tiny", blocks, (count,) * rows), hidden
        case 4:
            header = RequestHeader(session, dice.choice([0, 0, 1]))
            return dice.choice([KeepSession(header), CloseSession(header)]), None
        case 5:
            header = RequestHeader(session, 0, dice.randrange(9))
            starts, counts = (0,) * rows, (count,) * rows
            begin = BeginEpoch(header, ("somebody",))
            request = ReplayRequest(header, 1, starts, (), kv=dice.random() < 0.5)
            part = ReplayPart(header, dice.randrange(2), 1, starts, counts, (0,) * rows, ends=True)
            return dice.choice([(part, hidden), (request, None), (begin, None)])
        case _:
            return dice.choice([GetInfo(), Hello(1, "blocks")]), None


def opening(session: bytes) -> OpenSession:
    return OpenSession(RequestHeader(session, 0), "tiny", (10, 14), 1, 64, "float32")


def a_conversation(dice: random.Random) -> bytes:
    """Messages in any order, then perhaps some bytes changed or the end cut off."""
    session = dice.choice([b"s" * 16, b"t" * 16])
    said = bytearray()
    if dice.random() < 0.7:  # something to lose
        said += encoded(opening(session))
    said += b"".join(encoded(*a_message(dice)) for _ in range(dice.randrange(4)))
    if dice.random() < 0.7:
        said += encoded(Step(RequestHeader(session, 0, 5), (0,), (6,)), states(6))
    said += b"".join(encoded(*a_message(dice)) for _ in range(dice.randrange(1, 8)))
    match dice.randrange(4):
        case 0:
            for _ in range(dice.randrange(1, 4)):
                said[dice.randrange(len(said))] = dice.randrange(256)
        case 1:
            del said[dice.randrange(len(said)) :]
        case 2:
            said += dice.randbytes(dice.randrange(1, 300))
    return bytes(said)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_said_every_page_comes_back(seed: int) -> None:
    dice = random.Random(seed)
    opened: list[int] = []
    async with served(door=DOOR, num_tokens=256) as swarm:
        for _ in range(25):
            stream = await admitted_stream(swarm.client, swarm.workers[0].peer_id)
            stream.write(a_conversation(dice))
            for _ in range(20):
                await swarm.executor.call(swarm.pool.check_integrity)
            opened.append(len(swarm.service.sessions))
            await stream.close()
        assert any(opened) and swarm.runner.batches, "else this proves little"
        await swarm.at_rest()
        await still_right(swarm)


@pytest.mark.parametrize("seed", range(4))
async def test_strangers_that_never_greet(seed: int) -> None:
    dice = random.Random(seed)
    async with served() as swarm:
        await still_right(swarm)
        await settle()
        before = len(asyncio.all_tasks())
        transport, server = swarm.client.transport, swarm.workers[0].peer_id
        for _ in range(25):
            stream = await transport.open_stream(server, STREAM_PROTOCOL, 1.0)
            stream.write(a_conversation(dice) if dice.random() < 0.5 else dice.randbytes(400))
            await stream.close()
        assert swarm.pool.reserved_bytes == 0
        await still_right(swarm)
        await settle()
        assert len(asyncio.all_tasks()) == before


STEP = encoded(Step(RequestHeader(b"s" * 16, 0, 0), (0,), (6,)), states(6))


@pytest.mark.parametrize(
    "garbage",
    [
        random.Random(0).randbytes(64),
        frames.encode_header(FrameKind.MESSAGE, 1 << 30),
        frames.encode_frame(FrameKind.MESSAGE, random.Random(1).randbytes(100)),
        frames.encode_frame(FrameKind.CHUNK, b"x" * 100),
        STEP[: len(STEP) // 2],
    ],
    ids=["random", "too long", "no message", "a chunk of nothing", "half a tensor"],
)
async def test_garbage_costs_the_channel_and_nothing_else(garbage: bytes) -> None:
    async with served(door=DOOR) as swarm:
        stream = await admitted_stream(swarm.client, swarm.workers[0].peer_id)
        stream.write(encoded(opening(b"s" * 16)))
        assert isinstance(await read_message(stream), SessionOpened)
        stream.write(garbage)
        if garbage == STEP[: len(STEP) // 2]:
            await stream.close()
        else:
            await messages_until_end(stream, 10.0)
        await swarm.at_rest()
        await still_right(swarm)


async def test_a_client_gives_up_on_servers_of_another_version() -> None:
    """Opening a session where the only server speaks a later protocol ends, and says so."""
    async with split((0, 6)) as swarm:
        asked = 0

        async def newer(stream: Stream) -> None:
            nonlocal asked
            asked += 1
            welcome = msgspec.msgpack.encode([["Welcome", 99, "", b"", "more"], []])
            stream.write(frames.encode_frame(FrameKind.MESSAGE, welcome))

        await swarm.workers[0].node.transport.serve(STREAM_PROTOCOL, newer)
        with pytest.raises(VersionMismatch, match="99") as caught:
            await swarm.session(max_retries=2).step(states(1), (0,), (1,))
        assert "Update Petals" in caught.value.hint
        assert asked == 3
