"""Adapters that clients send to a server, message by message."""

import asyncio

import pytest
import torch

from petals.models.adapters.low_rank import Adapter
from petals.models.runtime.batch import Segment
from petals.server.config import ClientLimits
from petals.testing.manual_clock import ManualClock, settle
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
from petals.wire.requests import Step
from support.models import WIDTH, random_adapter
from support.reference import assert_close, states
from support.service import Served, served
from support.talk import MODEL, Talk

FORWARD = Forward(MODEL, (10, 14), (6,))


def adapter_of(rank: int, seed: int = 0, module: str = "self_attn.q_proj") -> Adapter:
    """An adapter of one matrix in all blocks."""
    return random_adapter(range(10, 14), rank, seed, module)


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
    segment = Segment(hidden=hidden, blocks=swarm.reference.blocks, adapter=adapter)
    return swarm.reference.run([segment])[0]


async def test_four_sessions_with_adapters_of_their_own_share_batches() -> None:
    async with served() as swarm:
        adapters = [adapter_of(2, 1, "self_attn.o_proj"), None, adapter_of(4, 2), adapter_of(7, 3)]
        texts = [states(6, seed=number) for number in range(4)]
        talks = [await swarm.talk() for _ in adapters]
        for number, (talk, adapter) in enumerate(zip(talks, adapters)):
            name = None if adapter is None else await put(talk, adapter)
            await talk.open(adapter=name)
            await talk.step(0, [0], [texts[number][:5]])
        swarm.runner.batches.clear()
        # The thread is held until all four steps wait, so that they share a batch.
        release = swarm.workers[0].hold()
        steps = (talk.step(1, [5], [text[5:]]) for talk, text in zip(talks, texts))
        running = asyncio.gather(*steps)
        await swarm.workers[0].faults.until_asked(Step, 8)
        await settle()
        release()
        outputs = await running
        assert swarm.runner.batches == [4]
        for (output,), text, adapter in zip(outputs, texts, adapters):
            assert_close(output, expected(swarm, text, adapter)[5:])
        for talk in talks:
            await talk.close()
        await swarm.at_rest()


async def test_it_is_for_its_owner_alone_and_sent_once() -> None:
    async with served() as swarm:
        talk, adapter = await swarm.talk(), adapter_of(3)
        name = await put(talk, adapter)
        used = swarm.service.adapters.num_bytes
        assert await put(talk, adapter) == name
        assert swarm.service.adapters.num_bytes == used
        other = await swarm.talk(swarm.stranger)
        assert (await other.refused(other.opening(adapter=name))).code == "unknown_adapter"


def changed(adapter: Adapter, which: int, tensor: torch.Tensor) -> list[torch.Tensor]:
    tensors = list(adapter.tensors)
    tensors[which] = tensor
    return tensors


GOOD = adapter_of(3)
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
    small = adapter_of(1)
    room = ClientLimits(max_adapter_bytes_per_peer=2 * (small.num_bytes + 5 * 2048))
    async with served(door=room) as swarm:
        talk = await swarm.talk()
        large = adapter_of(40)
        refused = await talk.refused(putting(large), *large.tensors)
        assert refused.code == "adapter_refused"
        for seed in (1, 2):
            talk.session_id = bytes([seed]) * 16
            await talk.open(adapter=await put(talk, adapter_of(1, seed)))
        third = adapter_of(1, 3)
        assert (await talk.refused(putting(third), *third.tensors)).code == "peer_busy"
        await talk.close()
        again = await swarm.talk()
        await put(again, third)
        again.session_id = bytes([1]) * 16
        (output,) = await again.step(0, [0], [states(4)])
        assert_close(output, expected(swarm, states(4), adapter_of(1, 1)))


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
        names = list(reversed(adapter_of(3).parts))
        adapter = Adapter({slot: adapter_of(3).parts[slot] for slot in names})
        forward = Forward(
            MODEL, (10, 14), (6, 4), adapter=await put(talk, adapter), pass_id=b"p" * 16
        )
        hidden, weights = states(10), states(10, seed=9)
        leaves = adapter.leaves(swarm.reference.blocks)
        assert leaves is not None
        segments = [
            Segment(hidden=part, blocks=swarm.reference.blocks, adapter=leaves)
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
    small = adapter_of(1)
    room = ClientLimits(max_adapter_bytes_per_peer=small.num_bytes + 6 * 2048)
    async with served(door=room) as swarm:
        talk = await swarm.talk()
        name = await put(talk, small)
        forward = Forward(MODEL, (10, 14), (6,), adapter=name, pass_id=b"p" * 16)
        await talk.ask(forward, states(6))
        await put(talk, adapter_of(1, seed=2))
        message = Backward(forward, kept=True, wants_adapter=True)
        assert (await talk.refused(message, states(6))).code == "unknown_adapter"
        await put(talk, small)
        answer, tensors = await talk.ask(message, states(6))
        assert isinstance(answer, BackwardResult)
        assert len(tensors) == 1 + 8
