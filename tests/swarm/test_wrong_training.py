"""Wrong requests for passes are refused with a type; abandoned passes hold no memory."""

from dataclasses import replace

import pytest
import torch

from petals.errors import PeerUnreachable
from petals.server.config import ClientLimits
from petals.server.policies import SchedulerConfig
from petals.testing.manual_clock import ManualClock, settle
from petals.wire.passes import Backward, Forward
from petals.wire.requests import GetInfo
from support.models import WIDTH
from support.reference import assert_close, states
from support.service import FussySpan, served
from support.training_case import assert_right, training_case


def nan(num_tokens: int) -> torch.Tensor:
    hidden = states(num_tokens)
    hidden[-1, -1] = torch.nan
    return hidden


N = 6
PROMPTS = torch.ones(4, 1, 2, WIDTH)


@pytest.mark.parametrize(
    ("changes", "tensors", "code"),
    [
        ({"taps": (9,)}, [states(N)], "bad_input"),
        ({"taps": (14,)}, [states(N)], "bad_input"),
        ({"taps": (11, 11)}, [states(N)], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N)], "bad_input"),
        ({"num_prompt_tokens": 2}, [PROMPTS], "bad_input"),
        ({"num_prompt_tokens": 3}, [states(N), PROMPTS], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N), PROMPTS[:3]], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N), PROMPTS[..., :-1]], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N), PROMPTS.expand(4, 3, 2, WIDTH)], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N), PROMPTS.long()], "bad_input"),
        ({"num_prompt_tokens": 2}, [states(N), PROMPTS * torch.nan], "bad_input"),
        ({"num_prompt_tokens": 2**31 - 1}, [states(N), PROMPTS], "length_exceeded"),
        ({"num_prompt_tokens": 0}, [states(N), PROMPTS], "bad_input"),
        ({"counts": (2**31 - 1,)}, [states(N)], "length_exceeded"),
        ({"adapter": "lora"}, [states(N)], "unknown_adapter"),
        ({}, [nan(N)], "bad_input"),
        ({}, [torch.full((N, WIDTH), FussySpan.poison)], "peer_failed"),
        ({}, [], "bad_input"),
    ],
)
async def test_passes_that_cannot_be(
    changes: dict[str, object], tensors: list[torch.Tensor], code: str
) -> None:
    async with served() as swarm:
        talk = await swarm.talk()
        fields: dict[str, object] = {"model": "tiny", "blocks": (10, 14), "counts": (4, 2)}
        request = Forward(**{**fields, "pass_id": b"p" * 16, **changes})
        assert (await talk.refused(request, *tensors)).code == code
        gradients = [states(N)] * (1 + len(request.taps))
        assert (await talk.refused(Backward(request), *gradients, *tensors)).code == code
        await assert_right(swarm, training_case(), kept=True)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "gradients",
    [
        [],
        [states(26)],
        [states(26)] * 3,
        [states(25), states(26)],
        [states(26), states(26)[:, :-1]],
        [states(26), states(26).long()],
    ],
)
async def test_gradients_that_cannot_be(gradients: list[torch.Tensor], kept: bool) -> None:
    """Nothing is lost: the kept pass still serves the right ones."""
    async with served() as swarm:
        talk, task = await swarm.talk(), training_case(taps=(12,), prompts=(1, 3))
        await task.forward(talk)
        inputs = [] if kept else task.inputs
        refusal = await talk.refused(Backward(task.request, kept=kept), *gradients, *inputs)
        assert refusal.code == "bad_input"
        _, found = await task.backward(talk, kept=True)
        assert_close(found, task.expected(swarm.reference)[1])
        await swarm.at_rest()


@pytest.mark.parametrize("kept", [True, False])
async def test_gradients_that_overflowed_flow_and_stay_in_their_pass(kept: bool) -> None:
    async with served() as swarm:
        talk, task = await swarm.talk(), training_case(taps=(12,), prompts=(1, 3))
        for gradients in ([nan(26), states(26)], [states(26), states(26) / 0]):
            wild = replace(task, gradients=gradients)
            await wild.forward(talk)
            _, found = await wild.backward(talk, kept=kept)
            for actual, expected in zip(found, wild.expected(swarm.reference)[1], strict=True):
                assert torch.equal(actual.isfinite(), expected.isfinite())
                assert not actual.isfinite().all()
        await assert_right(swarm, training_case(taps=(12,), prompts=(1, 3)), kept=True)
        await swarm.at_rest()


async def test_a_kept_pass_serves_once_and_its_own_peer() -> None:
    async with served() as swarm:
        mine, theirs, task = await swarm.talk(), await swarm.talk(swarm.stranger), training_case()
        kept = Backward(task.request, kept=True)
        assert (await mine.refused(kept, *task.gradients)).code == "pass_expired"
        await task.forward(mine)
        assert (await theirs.refused(kept, *task.gradients)).code == "pass_expired"
        other = training_case(counts=(4, 9, 13)).request
        assert (await mine.refused(Backward(other, kept=True), *task.gradients)).code == "bad_input"
        refusal = await mine.refused(kept, *task.gradients, *task.inputs)
        assert refusal.code == "bad_input"
        await task.backward(mine, kept=True)
        assert (await mine.refused(kept, *task.gradients)).code == "pass_expired"
        await swarm.at_rest()


async def test_a_repeated_forward_keeps_one_pass() -> None:
    async with served() as swarm:
        talk, task = await swarm.talk(), training_case()
        await task.forward(talk)
        once = swarm.workers[0].device.activation_budget.used_bytes
        await task.forward(talk)
        assert swarm.workers[0].device.activation_budget.used_bytes == once > 0
        result, _ = await task.backward(talk, kept=False)
        assert result.recomputed
        await swarm.at_rest()


async def test_saved_activations_are_dropped_after_the_lease() -> None:
    clock = ManualClock()
    async with served(clock=clock, door=ClientLimits(lease_seconds=60.0)) as swarm:
        talk, task = await swarm.talk(), training_case(prompts=(1, 4))
        answer, _ = await task.forward(talk)
        assert answer.kept and answer.lease_seconds == 60.0
        talk.channel.abort(PeerUnreachable("gone"))
        assert swarm.workers[0].device.activation_budget.used_bytes > 0
        for _ in range(6):
            await clock.advance(15.0)
            await settle()
        await swarm.at_rest()
        again = await swarm.talk()
        refusal = await again.refused(Backward(task.request, kept=True), *task.gradients)
        assert refusal.code == "pass_expired"


async def test_a_client_that_goes_away_takes_its_passes_along() -> None:
    scheduling = SchedulerConfig(max_batch_tokens=1, min_chunk_tokens=1)
    async with served(scheduling=scheduling) as swarm:
        talk, task = await swarm.talk(), training_case(counts=(64,) * 8)
        await talk.channel.send(task.request, task.inputs)
        await talk.channel.send(Backward(task.request), (*task.gradients, *task.inputs))
        await swarm.workers[0].until(lambda: len(swarm.runner.batches) >= 3)
        await talk.channel.close()
        await swarm.workers[0].until(lambda: not swarm.executor.waiting_tokens)
        assert len(swarm.runner.batches) < 32
        await swarm.at_rest()


async def test_a_full_cache_keeps_no_more_and_says_so() -> None:
    async with served() as swarm:
        talk, first = await swarm.talk(), training_case()
        await first.forward(talk)
        swarm.workers[0].device.activation_budget.cap_bytes = swarm.workers[
            0
        ].device.activation_budget.used_bytes
        second = training_case(seed=1, pass_id=b"2" * 16)
        answer, _ = await second.forward(talk)
        assert (answer.kept, answer.lease_seconds) == (False, 0.0)
        _, found = await second.backward(talk)
        assert_close(found, second.expected(swarm.reference)[1])
        await first.backward(talk, kept=True)
        await swarm.at_rest()


async def test_a_server_may_give_no_gradients() -> None:
    async with served(no_training="its operator does not allow training") as swarm:
        talk, task = await swarm.talk(), training_case()
        info, _ = await talk.ask(GetInfo())
        assert not info.trains
        refusal = await talk.refused(task.request, *task.inputs)
        assert refusal.code == "training_refused" and "operator" in refusal.message
        refusal = await talk.refused(Backward(task.request), *task.gradients, *task.inputs)
        assert refusal.code == "training_refused"
        reading = training_case(pass_id=None, taps=(11,), prompts=(1, 2))
        _, outputs = await reading.forward(talk)
        assert_close(outputs, reading.expected(swarm.reference)[0])


async def test_a_peer_has_only_its_share_of_bytes() -> None:
    async with served(door=ClientLimits(max_bytes_per_peer=4 * WIDTH * 100)) as swarm:
        talk, task = await swarm.talk(), training_case(taps=(10, 11, 12, 13))
        answer = await talk.refused(task.request, *task.inputs)
        assert answer.code == "peer_busy"
        await assert_right(swarm, training_case(pass_id=None), kept=False)
