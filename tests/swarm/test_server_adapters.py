"""Adapters that clients send to a server, message by message."""

import asyncio
import threading

import pytest
import torch

from petals.models.adapters.low_rank import Adapter, LowRank
from petals.models.runtime.batch import Segment
from petals.server.compute.jobs import Outcome
from petals.server.compute.step_job import StepJob
from petals.server.config import ClientLimits
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.manual_clock import ManualClock
from petals.wire.handshake import Refusal
from petals.wire.passes import (
    AdapterKept,
    AdapterPart,
    Backward,
    BackwardResult,
    Forward,
    ForwardResult,
    PutAdapter,
)
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import MODEL, Served, Talk, served

FORWARD = Forward(MODEL, (10, 14), (6,))


def random_adapter(rank: int, seed: int = 0, module: str = "self_attn.q_proj") -> Adapter:
    random = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            (block, module): LowRank(
                torch.randn(rank, WIDTH, generator=random) * 0.3,
                torch.randn(WIDTH, rank, generator=random) * 0.3,
                0.5,
            )
            for block in range(10, 14)
        }
    )


def putting(adapter: Adapter, name: str = "", **changes: object) -> PutAdapter:
    parts = tuple(
        AdapterPart(block, module, part.rank, part.scaling)
        for (block, module), part in adapter.parts.items()
    )
    fields: dict[str, object] = {"model": MODEL, "adapter": name or adapter.digest, "parts": parts}
    return PutAdapter(**{**fields, **changes})


async def put(talk: Talk, adapter: Adapter, name: str = "") -> str:
    answer, _ = await talk.ask(putting(adapter, name), *adapter.tensors)
    assert isinstance(answer, AdapterKept), answer
    return answer.adapter


def expected(swarm: Served, hidden: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    segment = Segment(hidden=hidden, blocks=swarm.span.blocks, adapter=adapter)
    return swarm.reference.run([segment])[0]


def wait_for_company(swarm: Served, num_steps: int) -> None:
    """Keep the compute thread busy until so many steps have been handed to it."""
    executor, came = swarm.executor, threading.Semaphore(0)
    run = executor.run

    async def counted(job: StepJob) -> Outcome[torch.Tensor]:
        running = asyncio.ensure_future(run(job))
        await asyncio.sleep(0)
        came.release()
        return await running

    executor.run = counted
    executor.post(lambda: [came.acquire() for _ in range(num_steps)])


async def test_four_sessions_with_adapters_of_their_own_share_batches() -> None:
    async with served() as swarm:
        adapters = [random_adapter(2, 1), None, random_adapter(4, 2), random_adapter(7, 3)]
        texts = [states(6, seed=number) for number in range(4)]
        talks = [await swarm.talk() for _ in adapters]
        for number, (talk, adapter) in enumerate(zip(talks, adapters)):
            talk.session_id = bytes([number]) * 16
            name = None if adapter is None else await put(talk, adapter)
            await talk.open(adapter=name)
            await talk.step(0, [0], [texts[number][:5]])
        swarm.runner.batches.clear()
        wait_for_company(swarm, 4)
        steps = (talk.step(1, [5], [text[5:]]) for talk, text in zip(talks, texts))
        outputs = await asyncio.gather(*steps)
        assert swarm.runner.batches == [4]
        for (output,), text, adapter in zip(outputs, texts, adapters):
            assert_close(output, expected(swarm, text, adapter)[5:])
        for talk in talks:
            await talk.close()
        await swarm.at_rest()


async def test_a_pass_with_an_adapter() -> None:
    async with served() as swarm:
        talk, adapter = await swarm.talk(), random_adapter(3)
        message = Forward(MODEL, (10, 14), (6,), adapter=await put(talk, adapter))
        answer, tensors = await talk.ask(message, states(6))
        assert isinstance(answer, ForwardResult)
        assert_close(tensors[0], expected(swarm, states(6), adapter))


async def test_it_is_for_its_owner_alone_and_sent_once() -> None:
    async with served() as swarm:
        talk, adapter = await swarm.talk(), random_adapter(3)
        name = await put(talk, adapter)
        used = swarm.service.adapters.num_bytes
        assert await put(talk, adapter) == name
        assert swarm.service.adapters.num_bytes == used
        joined = NodeConfig(initial_peers=await swarm.server.addresses())
        async with SwarmNode(joined, engine=swarm.net.engine) as stranger:
            other = await swarm.talk(stranger)
            assert (await other.refused(other.opening(adapter=name))).code == "unknown_adapter"
            await other.channel.close()


def changed(adapter: Adapter, which: int, tensor: torch.Tensor) -> list[torch.Tensor]:
    tensors = list(adapter.tensors)
    tensors[which] = tensor
    return tensors


GOOD = random_adapter(3)
PARTS = putting(GOOD).parts


@pytest.mark.parametrize(
    ("changes", "tensors", "code"),
    [
        ({"model": "another"}, GOOD.tensors, "unknown_model"),
        ({"parts": ()}, (), "adapter_refused"),
        ({}, GOOD.tensors[:-1], "adapter_refused"),
        ({}, changed(GOOD, 0, torch.zeros(4, WIDTH)), "adapter_refused"),
        ({}, changed(GOOD, 0, torch.zeros(3, WIDTH + 1)), "adapter_refused"),
        ({}, changed(GOOD, 1, torch.zeros(WIDTH, 2)), "adapter_refused"),
        ({}, changed(GOOD, 1, torch.zeros(WIDTH * 3, 3)), "adapter_refused"),
        ({}, changed(GOOD, 0, torch.zeros(3)), "adapter_refused"),
        ({}, changed(GOOD, 0, torch.tensor(1.0)), "adapter_refused"),
        ({}, changed(GOOD, 1, torch.zeros(WIDTH, 3, 1)), "adapter_refused"),
        ({}, changed(GOOD, 0, torch.zeros(3, WIDTH).long()), "adapter_refused"),
        ({}, changed(GOOD, 0, torch.full((3, WIDTH), float("nan"))), "adapter_refused"),
        ({"parts": (PARTS[0], *PARTS[:3])}, GOOD.tensors, "adapter_refused"),
        ({"parts": (AdapterPart(3, "self_attn.q_proj", 3, 1.0), *PARTS[1:])}, GOOD.tensors,
         "adapter_refused"),
        ({"parts": (AdapterPart(10, "self_attn.rotary", 3, 1.0), *PARTS[1:])}, GOOD.tensors,
         "adapter_refused"),
        ({"parts": (AdapterPart(10, "", 3, 1.0), *PARTS[1:])}, GOOD.tensors, "adapter_refused"),
        ({"parts": (AdapterPart(10, "self_attn", 3, 1.0), *PARTS[1:])}, GOOD.tensors,
         "adapter_refused"),
        ({"parts": (AdapterPart(10, "self_attn.q_proj", 3, float("nan")), *PARTS[1:])},
         GOOD.tensors, "protocol"),
    ],
)  # fmt: skip
async def test_adapters_that_cannot_be(changes, tensors, code: str) -> None:
    async with served() as swarm:
        good = await swarm.talk()
        await good.open(adapter=await put(good, GOOD, "good"))
        talk = await swarm.talk()
        used = swarm.service.adapters.num_bytes
        refused = await talk.refused(putting(GOOD, "bad", **changes), *tensors)
        assert (refused.code, bool(refused.hint)) == (code, True)
        assert swarm.service.adapters.num_bytes == used
        (output,) = await good.step(0, [0], [states(5)])
        assert_close(output, expected(swarm, states(5), GOOD))
        refused = await good.refused(Forward(MODEL, (10, 14), (6,), adapter="bad"), states(6))
        assert refused.code == "unknown_adapter"


async def test_a_client_has_so_much_room_and_no_more() -> None:
    small = random_adapter(1)
    room = ClientLimits(max_adapter_bytes_per_peer=2 * (small.num_bytes + 5 * 2048))
    async with served(door=room) as swarm:
        talk = await swarm.talk()
        large = random_adapter(40)
        refused = await talk.refused(putting(large), *large.tensors)
        assert refused.code == "adapter_refused"
        for seed in (1, 2):
            talk.session_id = bytes([seed]) * 16
            await talk.open(adapter=await put(talk, random_adapter(1, seed)))
        third = random_adapter(1, 3)
        assert (await talk.refused(putting(third), *third.tensors)).code == "peer_busy"
        await talk.close()
        again = await swarm.talk()
        await put(again, third)
        again.session_id = bytes([1]) * 16
        (output,) = await again.step(0, [0], [states(4)])
        assert_close(output, expected(swarm, states(4), random_adapter(1, 1)))


async def test_it_goes_with_the_lease() -> None:
    clock = ManualClock()
    async with served(clock=clock) as swarm:
        talk = await swarm.talk()
        name = await put(talk, GOOD)
        await talk.open(adapter=name)
        await talk.close()
        assert swarm.service.adapters.num_bytes
        for _ in range(10):
            await clock.advance(15.0)
        assert swarm.service.adapters.num_bytes == 0
        await swarm.at_rest()
        talk = await swarm.talk()
        answer, _ = await talk.ask(talk.opening(adapter=name))
        assert isinstance(answer, Refusal)
        assert answer.code == "unknown_adapter"


async def test_gradients_of_an_adapter_come_in_the_order_it_was_sent_in() -> None:
    """Kept and run again, over several strips; as autograd gives them on one machine."""
    async with served() as swarm:
        talk = await swarm.talk()
        names = list(reversed(random_adapter(3).parts))
        adapter = Adapter({slot: random_adapter(3).parts[slot] for slot in names})
        forward = Forward(
            MODEL, (10, 14), (6, 4), adapter=await put(talk, adapter), pass_id=b"p" * 16
        )
        hidden, weights = states(10), states(10, seed=9)
        leaves = adapter.leaves(swarm.span.blocks)
        assert leaves is not None
        segments = [
            Segment(hidden=part, blocks=swarm.span.blocks, adapter=leaves)
            for part in hidden.split((6, 4))
        ]
        (output,) = swarm.reference.trace(segments)[-1]
        expected = torch.autograd.grad((output * weights).sum(), leaves.tensors)
        for kept in (True, False):
            result, tensors = await talk.ask(forward, hidden)
            assert isinstance(result, ForwardResult)
            assert result.kept
            assert_close(tensors[0], output)
            inputs = () if kept else (hidden,)
            message = Backward(forward, kept=kept, wants_adapter=True)
            answer, tensors = await talk.ask(message, weights, *inputs)
            assert isinstance(answer, BackwardResult)
            assert answer.recomputed is not kept
            assert len(tensors) == 1 + len(expected)
            for found, wanted in zip(tensors[1:], expected):
                assert_close(found, wanted)
        await swarm.workers[0].check()


async def test_an_adapter_that_went_during_a_pass_is_asked_for_again() -> None:
    small = random_adapter(1)
    room = ClientLimits(max_adapter_bytes_per_peer=small.num_bytes + 6 * 2048)
    async with served(door=room) as swarm:
        talk = await swarm.talk()
        name = await put(talk, small)
        forward = Forward(MODEL, (10, 14), (6,), adapter=name, pass_id=b"p" * 16)
        await talk.ask(forward, states(6))
        await put(talk, random_adapter(1, seed=2))
        message = Backward(forward, kept=True, wants_adapter=True)
        assert (await talk.refused(message, states(6))).code == "unknown_adapter"
        await put(talk, small)
        answer, tensors = await talk.ask(message, states(6))
        assert isinstance(answer, BackwardResult)
        assert len(tensors) == 1 + 8
