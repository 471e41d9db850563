"""Whole sequences through the swarm, split over routes and repaired where a server fails."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.training.batch import MAX_AT_ONCE, Pass
from petals.client.training.hop_call import PassCall, PassOutput
from petals.errors import (
    BatchTooLarge,
    MissingBlocksError,
    PassExpired,
    PeerFailed,
    PeerMisbehaved,
    PeerUnreachable,
    PetalsError,
    TrainingRefused,
    UnknownAdapter,
)
from petals.swarm.rpc.channel import Channel
from petals.types import BlockSpan, PeerId
from petals.wire.messages import AnyMessage
from petals.wire.passes import Backward, Forward, PutAdapter
from support import service
from support.models import WIDTH, random_adapter
from support.reference import assert_close, states
from support.server_faults import wrong_outputs
from support.service import Served, Worker

ALL = BlockSpan(0, 4)
HALVES = ((0, 2), (2, 4))
WHOLE = (0, 4)
GRADIENT_ERROR = 1e-4
"""Gradients add up the errors of all tokens."""


def split(*spans: tuple[int, int], **options: Any) -> AbstractAsyncContextManager[Served]:
    room = {"max_length": 1024, "max_step_tokens": 1024, "max_rows": 128}
    return service.split(*spans, num_blocks=4, **(room | options))


async def run_rows(
    access: SwarmConnection, blocks: BlockSpan, hidden: Tensor, counts: tuple[int, ...]
) -> Tensor:
    output = await Pass(access, blocks, PassCall(counts), is_training=False).forward(hidden)
    return output.hidden


def kept(*workers: Worker) -> list[bool]:
    """Whether gradients were asked for with a pass that the server had kept."""
    return [message.kept for worker in workers for message in worker.faults.all(Backward)]


class Lesson:
    """One pass with everything that can be differentiated, here and in the swarm."""

    def __init__(
        self,
        swarm: Served,
        counts: Sequence[int],
        *,
        rows_share: bool = True,
        connection: SwarmConnection | None = None,
        **options: Any,
    ) -> None:
        draw = torch.Generator().manual_seed(7)
        num_rows = 1 if rows_share else len(counts)
        self.swarm = swarm
        self.access = connection or swarm.connection(**options)
        self.hidden = states(sum(counts), seed=5).requires_grad_()
        prompts = torch.randn(4, num_rows, 3, WIDTH, generator=draw).requires_grad_()
        adapter = random_adapter((0, 2, 3)).leaves(ALL)
        self.call = PassCall(tuple(counts), prompts, adapter, (1, 3))
        self.weights = [torch.randn(sum(counts), WIDTH, generator=draw) for _ in range(3)]
        self.running = Pass(self.access, ALL, self.call, is_training=True)

    @property
    def inputs(self) -> list[Tensor]:
        assert self.call.prompts is not None and self.call.adapter is not None
        return [self.hidden, self.call.prompts, *self.call.adapter.tensors]

    def expected(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        made = self.swarm.traced(self.hidden, self.call)
        outputs = [made[3], made[1], made[3]]
        return outputs, torch.autograd.grad(outputs, self.inputs, self.weights)

    async def begin(self) -> "Lesson":
        """Run the pass; what comes out is right."""
        output = await self.running.forward(self.hidden.detach())
        found = [output.hidden, *(output.tapped[block] for block in self.call.taps)]
        assert_close(found, self.expected()[0])
        return self

    async def gradients(self) -> tuple[Tensor, ...]:
        """Of ``inputs``, as the swarm finds them."""
        last, *taps = self.weights
        grads = await self.running.backward(PassOutput(last, dict(zip(self.call.taps, taps))))
        assert grads.prompts is not None
        return (grads.hidden, grads.prompts, *grads.adapter)

    async def end(self) -> None:
        """Ask for the gradients, which are right."""
        assert_close(await self.gradients(), self.expected()[1], GRADIENT_ERROR)

    async def learn(self) -> None:
        await (await self.begin()).end()

    async def refresh(self) -> None:
        """Learn of the servers that have come."""
        await (await self.access.view()).refresh()


async def test_rows_come_back_in_order() -> None:
    async with split((0, 2), (2, 4), (1, 4)) as swarm:
        rows = [states(n, seed=n) for n in (3, 700, 5, 600, 0, 1)]
        counts = tuple(len(row) for row in rows)
        output = await run_rows(swarm.connection(), ALL, torch.cat(rows), counts)
        assert_close(output, torch.cat([swarm.expected(row) for row in rows if len(row)]))
        asked = [message.counts for message in swarm.workers[0].faults.all(Forward)]
        assert asked == [(3,), (700,), (5,), (600,), (0, 1)]


async def test_part_of_the_blocks() -> None:
    async with split(*HALVES) as swarm:
        part, text = BlockSpan(1, 3), states(4)
        output = await run_rows(swarm.connection(), part, text, (4,))
        assert_close(output, swarm.expected(text, part))


@pytest.mark.parametrize(
    ("error", "num_servers", "num_asked"),
    [(PeerFailed("Broken."), 1, [3]), (BatchTooLarge("Too much."), 2, [1, 1])],
)
async def test_attempts_end(error: PetalsError, num_servers: int, num_asked: list[int]) -> None:
    async with split(*[WHOLE] * num_servers) as swarm:
        for worker in swarm.workers:
            worker.faults.refusals[Forward] = [error] * 10
        with pytest.raises(type(error)):
            await run_rows(swarm.connection(max_retries=2), ALL, states(4), (4,))
        assert swarm.num_asked(Forward) == num_asked


async def test_what_is_too_much_for_all_is_cut_smaller() -> None:
    async with split(WHOLE, max_step_tokens=20) as swarm:
        await Lesson(swarm, (9, 4, 13, 2, 7)).learn()
        taken = [message.counts for message in swarm.workers[0].faults.all(Forward)]
        assert taken[-3:] == [(9, 4), (13, 2), (7,)]


async def test_a_row_that_is_too_long_for_all_is_refused() -> None:
    async with split(WHOLE, max_step_tokens=20) as swarm:
        with pytest.raises(BatchTooLarge):
            await run_rows(swarm.connection(), ALL, states(25), (21, 4))


@pytest.mark.parametrize("answer", ["narrow", "nan", "nothing"])
async def test_wrong_outputs_and_gradients_are_not_taken(answer: str) -> None:
    async with split(WHOLE, WHOLE) as swarm:
        lesson = await Lesson(swarm, (4,), max_retries=1).begin()
        (asked,) = [worker for worker in swarm.workers if worker.faults.all(Forward)]
        asked.faults.rewrite = wrong_outputs(answer)
        await lesson.end()
        for worker in swarm.workers:
            worker.faults.rewrite = wrong_outputs(answer)
        with pytest.raises(PeerMisbehaved):
            await lesson.end()
        with pytest.raises(PeerMisbehaved):
            await run_rows(swarm.connection(max_retries=0), ALL, states(4), (4,))


class TestInfiniteGradients:
    """A gradient scaler lets gradients overflow on purpose: they flow, and honest servers stay."""

    async def test_of_the_output_flow_through_the_servers(self) -> None:
        async with split(*HALVES) as swarm:
            lesson = await Lesson(swarm, (5, 4)).begin()
            for last in lesson.weights:
                last[6, 0] = torch.inf
            found = await lesson.gradients()
            for actual, expected in zip(found, lesson.expected()[1], strict=True):
                assert torch.equal(actual.isfinite(), expected.isfinite())
            assert found[0][:5].isfinite().all() and not found[0][5:].isfinite().any()
            assert swarm.num_asked(Backward) == [1, 1]

    async def test_finite_ones_that_overflow_in_a_server_are_no_fault_of_it(self) -> None:
        async with split(WHOLE) as swarm:
            lesson = await Lesson(swarm, (5, 4), max_retries=0).begin()
            lesson.weights = [weights * 2.0**126 for weights in lesson.weights]
            assert not all(bool(grad.isfinite().all()) for grad in lesson.expected()[1])
            found = await lesson.gradients()
            assert not all(bool(grad.isfinite().all()) for grad in found)
            # The server was asked again with smaller gradients, whose answer was finite.
            assert kept(swarm.workers[0]) == [True, False]
            lesson.weights = [weights * 2.0**-126 for weights in lesson.weights]
            await lesson.end()

    async def test_a_server_that_makes_them_of_small_ones_is_found_out(self) -> None:
        async with split(WHOLE, WHOLE) as swarm:
            lesson = await Lesson(swarm, (4,), max_retries=1).begin()
            (asked,) = [worker for worker in swarm.workers if worker.faults.all(Forward)]
            asked.faults.rewrite = wrong_outputs("nan")
            lesson.weights = [weights * 1e-9 for weights in lesson.weights]
            await lesson.end()
            assert kept(asked) == [True]  # they were too small to overflow: it was not asked again


async def test_nobody_there() -> None:
    async with split((0, 3)) as swarm:
        with pytest.raises(MissingBlocksError, match="3:4"):
            await run_rows(swarm.connection(), ALL, states(4), (4,))


async def test_channels_are_used_again() -> None:
    async with split(WHOLE) as swarm:
        connection, (server,) = swarm.connection(max_pinged=0), swarm.workers
        for _ in range(3):
            await run_rows(connection, ALL, states(4), (4,))
        (channel,) = server.faults.channels
        await connection.close()
        await server.until(lambda: channel.is_closed)


@pytest.mark.parametrize("training_bytes", [2**26, 0], ids=["kept", "run again"])
@pytest.mark.parametrize("rows_share", [True, False], ids=["one prompt", "prompts of rows"])
async def test_gradients_are_those_of_here(rows_share: bool, training_bytes: int) -> None:
    async with split((0, 2), (1, 4), (3, 4), training_bytes=training_bytes) as swarm:
        await Lesson(swarm, (40, 2, 70, 1, 66, 64), rows_share=rows_share).learn()
        assert swarm.num_asked(Forward)[0] == swarm.num_asked(Backward)[0] == 5
        assert set(kept(swarm.workers[0])) == {training_bytes > 0}


async def test_a_second_way_back_brings_the_inputs() -> None:
    async with split(*HALVES) as swarm:
        lesson = await Lesson(swarm, (5, 3)).begin()
        await lesson.end()
        await lesson.end()
        for worker in swarm.workers:
            assert kept(worker) == [True, False]


async def test_an_expired_pass_is_given_again() -> None:
    async with split(*HALVES) as swarm:
        lesson, (first, last) = await Lesson(swarm, (5, 3)).begin(), swarm.workers
        first.faults.refusals[Backward] = [PassExpired("Gone.")]
        await lesson.end()
        assert kept(first) == [True, False]
        assert kept(last) == [True]
        assert swarm.num_asked(Forward) == [1, 1]


async def test_a_server_that_forgets_what_it_was_just_given() -> None:
    async with split(WHOLE) as swarm:
        lesson = await Lesson(swarm, (5, 3), max_retries=0).begin()
        swarm.workers[0].faults.refusals[Backward] = [PassExpired("Gone.")] * 2
        with pytest.raises(PeerMisbehaved, match="loss of a pass"):
            await lesson.end()


class TestDeaths:
    """A failure repeats the range of the server that failed, and no other."""

    async def test_on_the_way_back(self) -> None:
        async with split((0, 1), (1, 3), (3, 4)) as swarm:
            lesson, (first, middle, last) = await Lesson(swarm, (5, 3)).begin(), swarm.workers
            spare = await swarm.add(1, 3)
            await lesson.refresh()
            swarm.net.kill(middle.peer_id)
            await lesson.end()
            assert swarm.num_asked(Forward) == [1, 1, 1, 0]
            assert swarm.num_asked(Backward) == [1, 0, 1, 1]
            assert kept(first, last, spare) == [True, True, False]

    async def test_on_the_way_there_and_two_take_its_place(self) -> None:
        async with split((0, 1), (1, 3), (3, 4)) as swarm:
            middle, lesson = swarm.workers[1], Lesson(swarm, (5, 3), repair_timeout=20.0)
            await (await lesson.access.view()).records()
            for start, end in ((1, 2), (2, 3)):
                await swarm.add(start, end)

            def die(message: AnyMessage) -> None:
                if isinstance(message, Forward):
                    swarm.net.kill(middle.peer_id)

            middle.faults.on_asked = die
            await lesson.learn()
            assert swarm.num_asked(Forward) == [1, 1, 1, 1, 1]
            assert swarm.num_asked(Backward) == [1, 0, 1, 1, 1]
            assert all(kept(*swarm.workers))

    async def test_on_the_way_back_and_two_take_its_place(self) -> None:
        async with split((0, 1), (1, 4)) as swarm:
            lesson = await Lesson(swarm, (5, 3)).begin()
            near, far = await swarm.add(0, 2), await swarm.add(2, 4)
            await lesson.refresh()
            swarm.net.kill(swarm.workers[1].peer_id)
            await lesson.end()
            assert swarm.num_asked(Forward) == [1, 1, 1, 0]
            assert swarm.num_asked(Backward) == [1, 0, 1, 1]
            assert [message.blocks for message in near.faults.all(Forward)] == [(1, 2)]
            asked = [worker.faults.all(Backward)[0].forward.blocks for worker in (near, far)]
            assert asked == [(1, 2), (2, 4)]
            assert kept(near, far) == [True, False]

    async def test_a_replacement_that_dies_as_well(self) -> None:
        async with split((0, 1), (1, 4)) as swarm:
            lesson = await Lesson(swarm, (5, 3)).begin()
            near, far = await swarm.add(1, 2), await swarm.add(2, 4)
            spare = await swarm.add(1, 4)
            await lesson.refresh()
            swarm.net.kill(swarm.workers[1].peer_id)
            swarm.net.kill(near.peer_id)
            far.faults.refusals[Backward] = [PeerFailed("Broken.")] * 3
            spare.faults.refusals[Backward] = [PeerFailed("Busy.")]
            await lesson.end()
            assert swarm.num_asked(Forward)[0] == swarm.num_asked(Backward)[0] == 1

    async def test_the_only_server_is_waited_for(self) -> None:
        async with split(*HALVES) as swarm:
            lesson = await Lesson(swarm, (5, 3), repair_timeout=0.1).begin()
            swarm.net.kill(swarm.workers[1].peer_id)
            with pytest.raises(MissingBlocksError, match="2:4") as nobody:
                await lesson.end()
            assert isinstance(nobody.value.__cause__, PeerUnreachable)
            await swarm.add(2, 4)
            await lesson.refresh()
            await lesson.end()

    async def test_the_directory_is_not_waited_for(self) -> None:
        async with split(*HALVES) as swarm:
            lesson = await Lesson(swarm, (5, 3), update_period=1e-6).begin()
            spare = await swarm.add(2, 4)
            await lesson.refresh()
            asked = swarm.silence_directory()
            swarm.net.kill(swarm.workers[1].peer_id)
            await lesson.end()
            assert spare.faults.all(Backward) and asked.is_set()


@pytest.mark.parametrize("way", ["there", "back"])
async def test_one_waits_for_a_silent_server_and_tells_the_others(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with split(*HALVES) as swarm:
        silent = swarm.workers[1].peer_id
        short = {"silence_timeout": 0.3, "connect_timeout": 0.3, "repair_timeout": 20.0}
        lesson = Lesson(swarm, (64,) * 12, **short)
        view = await lesson.access.view()
        await (lesson.begin() if way == "back" else view.records())
        await swarm.add(2, 4)
        swarm.net.pause(silent)
        asked: list[PeerId] = []
        take = view.channels.take

        async def count(peer: PeerId, service: str, timeout: float) -> Channel:
            asked.append(peer)
            return await take(peer, service, timeout)

        monkeypatch.setattr(view.channels, "take", count)
        if way == "there":
            await lesson.begin()
        await lesson.refresh()
        await lesson.end()
        assert 0 < asked.count(silent) <= MAX_AT_ONCE
        now = swarm.client.clock.monotonic()
        assert view.bans.at(now) == {silent}
        # It was banned once, however many passes waited for it.
        assert not view.bans.at(now + view.config.ban_timeout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_states_travel_in_their_dtype(dtype: torch.dtype) -> None:
    async with split(*HALVES) as swarm:
        call = PassCall((5, 3), torch.randn(4, 1, 2, WIDTH))
        running = Pass(swarm.connection(), ALL, call, is_training=True)
        output = await running.forward(states(8).to(dtype))
        grads = await running.backward(PassOutput(torch.ones_like(output.hidden)))
        assert (output.hidden.dtype, grads.hidden.dtype) == (dtype, dtype)
        assert grads.prompts is not None and grads.prompts.dtype == torch.float32
        assert_close(output.hidden, swarm.traced(states(8), call)[3], 0.05)


class TestServersThatDoNotTrain:
    async def test_those_that_say_so_are_left_out(self) -> None:
        async with split(*HALVES) as swarm:
            silent = await swarm.add(*WHOLE, no_training="not allowed")
            for _ in range(4):
                await Lesson(swarm, (5, 3)).learn()
            assert not silent.faults.all(Forward)
            assert swarm.num_asked(Backward) == [4, 4, 0]
        async with split(*HALVES, no_training="not allowed") as swarm:
            with pytest.raises(TrainingRefused, match="0:4"):
                await Lesson(swarm, (5, 3)).learn()
            await run_rows(swarm.connection(), ALL, states(4), (4,))

    async def test_those_that_refuse_are_left_out(self) -> None:
        async with split(*HALVES, HALVES[1]) as swarm:
            _, one, other = swarm.workers
            one.faults.refusals[Forward] = [TrainingRefused("Not here.")] * 10
            await Lesson(swarm, (5, 3)).learn()
            assert not one.faults.all(Backward)
            other.faults.refusals[Forward] = [TrainingRefused("Not here.")] * 10
            with pytest.raises(TrainingRefused):
                await Lesson(swarm, (5, 3)).learn()


async def test_an_adapter_is_sent_once_and_again_where_it_was_forgotten() -> None:
    async with split(*HALVES) as swarm:
        connection = swarm.connection()
        lesson = await Lesson(swarm, (64,) * 6, connection=connection).begin()
        assert swarm.num_asked(PutAdapter) == [1, 1]
        swarm.workers[1].faults.refusals[Backward] = [UnknownAdapter("No such adapter.")]
        await lesson.end()
        await Lesson(swarm, (64,) * 6, connection=connection).learn()
        assert swarm.num_asked(PutAdapter) == [1, 2]
