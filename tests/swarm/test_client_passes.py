"""Whole sequences through the swarm, split over routes and repaired where a server fails."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from petals.client.routing.sequence_manager import SwarmConnection
from petals.client.training.batch import MAX_AT_ONCE as AT_ONCE
from petals.client.training.batch import MAX_TOKENS, Pass, micro_batch_tokens, micro_batches
from petals.client.training.hop_call import PassCall, PassOutput
from petals.errors import (
    BatchTooLarge,
    MissingBlocksError,
    PassExpired,
    PeerFailed,
    PeerMisbehaved,
    PeerUnreachable,
    TrainingRefused,
)
from petals.swarm.rpc.channel import Channel
from petals.types import BlockSpan, PeerId
from support.fake_server import HIDDEN, ToyAdapter, ToySwarm, expected, run_call, states, toy_swarm

ALL = BlockSpan(0, 4)


async def run_rows(
    access: SwarmConnection, blocks: BlockSpan, hidden: Tensor, counts: tuple[int, ...]
) -> Tensor:
    output = await Pass(access, blocks, PassCall(counts), is_training=False).forward(hidden)
    return output.hidden


class Lesson:
    """One pass with everything that can be differentiated, here and in the swarm."""

    def __init__(self, counts: Sequence[int], *, rows_share: bool = True) -> None:
        draw = torch.Generator().manual_seed(7)
        num_rows = 1 if rows_share else len(counts)
        self.hidden = states(sum(counts), seed=5).requires_grad_()
        prompts = torch.randn(4, num_rows, 3, HIDDEN, generator=draw).requires_grad_()
        self.call = PassCall(tuple(counts), prompts, ToyAdapter.random((0, 2, 3)), (1, 3))
        self.weights = [torch.randn(sum(counts), HIDDEN, generator=draw) for _ in range(3)]

    @property
    def inputs(self) -> list[Tensor]:
        assert self.call.prompts is not None and self.call.adapter is not None
        return [self.hidden, self.call.prompts, *self.call.adapter.tensors]

    def expected(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        made = run_call(self.hidden, ALL, self.call)
        outputs = [made[3], made[1], made[3]]
        return outputs, torch.autograd.grad(outputs, self.inputs, self.weights)

    async def learn(self, swarm: ToySwarm, **options: object) -> None:
        """Forward and backward through the swarm give what they give here."""
        lesson = await self.begin(swarm.access(4, **options))
        await self.end(lesson)

    async def begin(self, access: SwarmConnection) -> Pass:
        lesson = Pass(access, ALL, self.call, is_training=True)
        output = await lesson.forward(self.hidden.detach())
        found = [output.hidden, *(output.tapped[block] for block in self.call.taps)]
        torch.testing.assert_close(found, [wanted.detach() for wanted in self.expected()[0]])
        return lesson

    async def end(self, lesson: Pass) -> None:
        last, *taps = self.weights
        grads = await lesson.backward(PassOutput(last, dict(zip(self.call.taps, taps))))
        found = (grads.hidden, grads.prompts, *grads.adapter)
        torch.testing.assert_close(found, self.expected()[1])


async def test_rows_come_back_in_order() -> None:
    async with toy_swarm((0, 2), (2, 4), (1, 4)) as swarm:
        rows = [states(n, seed=n) for n in (3, 700, 5, 600, 0, 1)]
        counts = tuple(len(row) for row in rows)
        output = await run_rows(swarm.access(4), ALL, torch.cat(rows), counts)
        wanted = torch.cat([expected(row, ALL) for row in rows])
        torch.testing.assert_close(output, wanted)
        assert [forward.counts for forward in swarm.servers[0].forwards] == [
            (3,),
            (700,),
            (5,),
            (600,),
            (0, 1),
        ]


async def test_part_of_the_blocks() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        part, text = BlockSpan(1, 3), states(4)
        output = await run_rows(swarm.access(4), part, text, (4,))
        torch.testing.assert_close(output, expected(text, part))


async def test_a_failure_in_the_middle_is_mended_from_there() -> None:
    async with toy_swarm((0, 2), (2, 4), (2, 4)) as swarm:
        first, *last = swarm.servers
        for server in last:
            server.refuse_steps.append(PeerFailed("Broken."))
        text = states(4)
        output = await run_rows(swarm.access(4), ALL, text, (4,))
        torch.testing.assert_close(output, expected(text, ALL))
        assert len(first.forwards) == 1


async def test_retries_end() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].refuse_steps += [PeerFailed("Broken.")] * 10
        with pytest.raises(PeerFailed):
            await run_rows(swarm.access(4, max_retries=2), ALL, states(4), (4,))
        assert len(swarm.servers[0].forwards) == 3


async def test_what_is_too_much_for_all_is_cut_smaller() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].max_pass_tokens = 20
        await Lesson((9, 4, 13, 2, 7)).learn(swarm)
        taken = [forward.counts for forward in swarm.servers[0].forwards]
        assert taken[-3:] == [(9, 4), (13, 2), (7,)]


async def test_a_row_that_is_too_long_for_all_is_refused() -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].max_pass_tokens = 20
        with pytest.raises(BatchTooLarge):
            await run_rows(swarm.access(4), ALL, states(25), (21, 4))


async def test_a_refusal_by_all_is_said() -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        for server in swarm.servers:
            server.refuse_steps.append(BatchTooLarge("Too much."))
        with pytest.raises(BatchTooLarge):
            await run_rows(swarm.access(4), ALL, states(4), (4,))
        assert [len(server.forwards) for server in swarm.servers] == [1, 1]


@pytest.mark.parametrize("answer", ["narrow", "nan", "nothing"])
async def test_a_wrong_answer_is_not_taken(answer: str) -> None:
    async with toy_swarm((0, 4)) as swarm:
        swarm.servers[0].answer = answer
        with pytest.raises(PeerMisbehaved):
            await run_rows(swarm.access(4, max_retries=0), ALL, states(4), (4,))


@pytest.mark.parametrize("answer", ["narrow", "nan", "nothing"])
async def test_wrong_gradients_are_not_taken(answer: str) -> None:
    async with toy_swarm((0, 4), (0, 4)) as swarm:
        lesson = Lesson((4,))
        begun = await lesson.begin(swarm.access(4, max_retries=1))
        (asked,) = [server for server in swarm.servers if server.forwards]
        asked.answer = answer
        await lesson.end(begun)
        for server in swarm.servers:
            server.answer = answer
        with pytest.raises(PeerMisbehaved):
            await lesson.end(begun)


async def test_nobody_there() -> None:
    async with toy_swarm((0, 3)) as swarm:
        with pytest.raises(MissingBlocksError, match="3:4"):
            await run_rows(swarm.access(4), ALL, states(4), (4,))


async def test_channels_are_used_again() -> None:
    async with toy_swarm((0, 4)) as swarm:
        access = swarm.access(4, max_pinged=0)
        for _ in range(3):
            await run_rows(access, ALL, states(4), (4,))
        view = await access.view()
        channels = view.channels._idle[swarm.servers[0].peer_id, "blocks"]
        assert len(channels) == 1
        await access.close()
        assert channels[0].is_closed


@pytest.mark.parametrize("has_room", [True, False], ids=["kept", "run again"])
@pytest.mark.parametrize("rows_share", [True, False], ids=["one prompt", "prompts of rows"])
async def test_gradients_are_those_of_here(rows_share: bool, has_room: bool) -> None:
    async with toy_swarm((0, 2), (1, 4), (3, 4), has_room=has_room) as swarm:
        await Lesson((40, 2, 70, 1, 66, 64), rows_share=rows_share).learn(swarm)
        first = swarm.servers[0]
        assert len(first.forwards) == len(first.backwards) == 5
        assert {message.kept for message in first.backwards} == {has_room}


async def test_a_second_way_back_brings_the_inputs() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4))
        await lesson.end(begun)
        await lesson.end(begun)
        for server in swarm.servers:
            assert [message.kept for message in server.backwards] == [True, False]


async def test_an_expired_pass_is_given_again() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4))
        swarm.servers[0].kept.clear()
        await lesson.end(begun)
        first, last = swarm.servers
        assert [message.kept for message in first.backwards] == [True, False]
        assert [message.kept for message in last.backwards] == [True]
        assert len(first.forwards) == len(last.forwards) == 1


async def test_a_server_that_forgets_what_it_was_just_given() -> None:
    async with toy_swarm((0, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4, max_retries=0))
        swarm.servers[0].refuse_backwards += [PassExpired("Gone.")] * 2
        with pytest.raises(PeerMisbehaved, match="loss of a pass"):
            await lesson.end(begun)


async def test_a_failure_on_the_way_back_repeats_that_range_only() -> None:
    async with toy_swarm((0, 1), (1, 3), (3, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4))
        first, middle, last = swarm.servers
        spare = await swarm.add(1, 3)
        await (await begun._access.view()).refresh()
        swarm.net.kill(middle.peer_id)
        await lesson.end(begun)
        assert [len(server.forwards) for server in swarm.servers] == [1, 1, 1, 0]
        assert [len(server.backwards) for server in swarm.servers] == [1, 0, 1, 1]
        assert [message.kept for message in first.backwards + last.backwards] == [True, True]
        assert [message.kept for message in spare.backwards] == [False]


async def test_a_death_on_the_way_there_repeats_that_range_only() -> None:
    async with toy_swarm((0, 1), (1, 3), (3, 4)) as swarm:
        first, middle, last = swarm.servers
        lesson, access = Lesson((5, 3)), swarm.access(4, repair_timeout=20.0)
        await (await access.view()).records()
        near, far = await swarm.add(1, 2), await swarm.add(2, 3)
        middle.on_forward = lambda: swarm.net.kill(middle.peer_id)
        await lesson.end(await lesson.begin(access))
        assert [len(server.forwards) for server in swarm.servers] == [1, 1, 1, 1, 1]
        assert [len(server.backwards) for server in swarm.servers] == [1, 0, 1, 1, 1]
        assert all(
            message.kept for server in (first, near, far, last) for message in server.backwards
        )


@pytest.mark.parametrize("way", ["there", "back"])
async def test_one_waits_for_a_silent_server_and_tells_the_others(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        silent = swarm.servers[1]
        short = {"silence_timeout": 0.3, "connect_timeout": 0.3, "repair_timeout": 20.0}
        lesson, access = Lesson((64,) * 12), swarm.access(4, **short)
        view = await access.view()
        begun = await lesson.begin(access) if way == "back" else None
        await view.records()
        await swarm.add(2, 4)
        swarm.net.pause(silent.peer_id)
        asked: list[PeerId] = []
        take = view.channels.take

        async def count(peer: PeerId, service: str, timeout: float) -> Channel:
            asked.append(peer)
            return await take(peer, service, timeout)

        monkeypatch.setattr(view.channels, "take", count)
        begun = begun or await lesson.begin(access)
        await view.refresh()
        await lesson.end(begun)
        assert 0 < asked.count(silent.peer_id) <= AT_ONCE
        (ban,) = view.bans._bans.values()
        assert ban.seconds == view.config.ban_timeout


async def test_who_takes_a_lost_servers_place_is_known_without_the_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        lesson, access = Lesson((5, 3)), swarm.access(4, update_period=1e-6)
        begun = await lesson.begin(access)
        spare = await swarm.add(2, 4)
        await (await access.view()).refresh()
        asked = swarm.hush_directory(monkeypatch)
        swarm.net.kill(swarm.servers[1].peer_id)
        await lesson.end(begun)
        assert spare.backwards and asked.is_set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_states_travel_in_their_dtype(dtype: torch.dtype) -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        call = PassCall((5, 3), torch.randn(4, 1, 2, HIDDEN))
        lesson = Pass(swarm.access(4), ALL, call, is_training=True)
        output = await lesson.forward(states(8).to(dtype))
        grads = await lesson.backward(PassOutput(torch.ones_like(output.hidden)))
        assert (output.hidden.dtype, grads.hidden.dtype) == (dtype, dtype)
        assert grads.prompts is not None and grads.prompts.dtype == torch.float32
        wanted = run_call(states(8), ALL, call)[3]
        torch.testing.assert_close(output.hidden.float(), wanted, rtol=0.05, atol=0.05)


async def test_two_servers_take_the_place_of_one_on_the_way_back() -> None:
    async with toy_swarm((0, 1), (1, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4))
        near, far = await swarm.add(0, 2), await swarm.add(2, 4)
        await (await begun._access.view()).refresh()
        swarm.net.kill(swarm.servers[1].peer_id)
        await lesson.end(begun)
        assert [len(server.forwards) for server in swarm.servers] == [1, 1, 1, 0]
        assert [message.blocks for message in near.forwards] == [(1, 2)]
        assert [(m.forward.blocks, m.kept) for m in near.backwards] == [((1, 2), True)]
        assert [(m.forward.blocks, m.kept) for m in far.backwards] == [((2, 4), False)]
        assert [len(server.backwards) for server in swarm.servers] == [1, 0, 1, 1]


async def test_a_replacement_that_dies_as_well() -> None:
    async with toy_swarm((0, 1), (1, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4))
        near, far = await swarm.add(1, 2), await swarm.add(2, 4)
        spare = await swarm.add(1, 4)
        await (await begun._access.view()).refresh()
        swarm.net.kill(swarm.servers[1].peer_id)
        swarm.net.kill(near.peer_id)
        far.refuse_backwards += [PeerFailed("Broken.")] * 3
        spare.refuse_backwards.append(PeerFailed("Busy."))
        await lesson.end(begun)
        assert len(swarm.servers[0].forwards) == len(swarm.servers[0].backwards) == 1


async def test_the_only_server_is_waited_for() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        lesson = Lesson((5, 3))
        begun = await lesson.begin(swarm.access(4, repair_timeout=0.1))
        swarm.net.kill(swarm.servers[1].peer_id)
        with pytest.raises(MissingBlocksError, match="2:4") as nobody:
            await lesson.end(begun)
        assert isinstance(nobody.value.__cause__, PeerUnreachable)
        await swarm.add(2, 4)
        await (await begun._access.view()).refresh()
        await lesson.end(begun)


async def test_servers_that_give_no_gradients_are_left_out() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        silent = await swarm.add(0, 4, trains=False)
        for _ in range(4):
            await Lesson((5, 3)).learn(swarm)
        assert not silent.forwards
        assert [len(server.backwards) for server in swarm.servers] == [4, 4, 0]
    async with toy_swarm((0, 2), (2, 4), trains=False) as swarm:
        with pytest.raises(TrainingRefused, match="0:4"):
            await Lesson((5, 3)).learn(swarm)
        await run_rows(swarm.access(4), ALL, states(4), (4,))


async def test_servers_that_refuse_to_train_are_left_out() -> None:
    async with toy_swarm((0, 2), (2, 4), (2, 4)) as swarm:
        swarm.servers[1].refuse_steps += [TrainingRefused("Not here.")] * 10
        await Lesson((5, 3)).learn(swarm)
        assert not swarm.servers[1].backwards
        swarm.servers[2].refuse_steps += [TrainingRefused("Not here.")] * 10
        with pytest.raises(TrainingRefused):
            await Lesson((5, 3)).learn(swarm)


async def test_an_adapter_is_sent_once_and_again_where_it_was_forgotten() -> None:
    async with toy_swarm((0, 2), (2, 4)) as swarm:
        access = swarm.access(4)
        lesson = Lesson((64,) * 6)
        begun = await lesson.begin(access)
        assert [server.num_given for server in swarm.servers] == [1, 1]
        swarm.servers[1].given.clear()
        swarm.servers[1].kept.clear()
        await lesson.end(begun)
        await lesson.end(await lesson.begin(access))
        assert swarm.servers[0].num_given == 1
        assert swarm.servers[1].num_given > 1


def test_micro_batches_hold_whole_rows() -> None:
    assert list(micro_batches((3, 3, 3, 9, 1), 6)) == [(3, 3), (3,), (9,), (1,)]
    assert list(micro_batches((), 6)) == []
    assert list(micro_batches((0,) * 300, 6)) == [(0,) * 128, (0,) * 128, (0,) * 44]


def test_a_route_of_n_hops_gets_about_twice_n() -> None:
    assert micro_batch_tokens(10, 3) == 64
    assert micro_batch_tokens(768, 3) == 128
    assert micro_batch_tokens(10**6, 3) == MAX_TOKENS
