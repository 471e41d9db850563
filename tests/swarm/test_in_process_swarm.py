"""The public in-process swarm does what its documentation says, in both kinds of code."""

from pathlib import Path

import pytest
import torch

from petals.errors import PetalsError
from petals.testing.in_process_swarm import InProcessSwarm
from petals.types import BlockSpan, PeerId
from support.reference import states, token_ids

HEAD, TAIL = BlockSpan(0, 2), BlockSpan(2, 5)
QUICK = {
    "silence_timeout": 1.0,
    "connect_timeout": 0.5,
    "repair_timeout": 10.0,
    "min_backoff": 0.0,
    "max_pinged": 0,
}


def test_a_generation_outlives_a_killed_server(llama: Path) -> None:
    prompt = token_ids(1, 7)
    with InProcessSwarm(llama, HEAD, TAIL) as swarm:
        model = swarm.model()
        with model.inference_session(max_length=32) as session:
            first = model.generate(prompt, max_new_tokens=4)
            replica = swarm.run(swarm.add(TAIL))
            swarm.kill(session.trace.hops[1].peer_id)
            second = model.generate(None, max_new_tokens=4)
            assert session.trace.hops[1].peer_id == replica
        whole = swarm.model().generate(prompt, max_new_tokens=8)
        assert torch.equal(torch.cat([first, second], dim=1), whole)


def test_every_model_is_a_peer_of_its_own(llama: Path) -> None:
    with InProcessSwarm(llama, BlockSpan(0, 5)) as swarm:
        (server,), askers = swarm.peers, set[PeerId]()
        swarm.net.on_write = lambda by, to, size: askers.add(by) if to == server else None
        for _ in range(2):
            swarm.model()(token_ids(1, 3))
        assert len(askers) == 2


@pytest.mark.parametrize("fault", ["kill", "pause", "partition", "mute", "stop"])
async def test_each_fault_costs_a_hop_and_no_session(llama: Path, fault: str) -> None:
    async with InProcessSwarm(llama, HEAD, TAIL, TAIL, client=QUICK) as swarm:
        async with swarm.session(max_length=32) as session:
            before = await session.step(states(6), (0,), (6,))
            victim = session.trace.hops[1].peer_id
            match fault:
                case "mute":
                    swarm.partition(victim, one_way=True)
                case _:
                    getattr(swarm, fault)(victim)
            again = await session.step(states(6), (0,), (6,))
            while fault == "stop" and victim in {hop.peer_id for hop in session.trace.hops}:
                again = await session.step(states(6), (0,), (6,))
            assert victim not in {hop.peer_id for hop in session.trace.hops}
            torch.testing.assert_close(again, before)


async def test_what_is_resumed_and_healed_serves_again(llama: Path) -> None:
    async with InProcessSwarm(llama, BlockSpan(0, 5), client=QUICK) as swarm:
        (peer,) = swarm.peers
        for harm, mend in ((swarm.pause, swarm.resume), (swarm.partition, swarm.heal)):
            harm(peer)
            with pytest.raises(PetalsError):
                async with swarm.session(max_length=8, max_retries=0, repair_timeout=0.1) as lost:
                    await lost.step(states(1), (0,), (1,))
            mend(peer)
            async with swarm.session(max_length=8) as session:
                await session.step(states(1), (0,), (1,))


async def test_a_server_that_cannot_start_says_why_and_leaves_nothing(llama: Path) -> None:
    async with InProcessSwarm(llama, HEAD) as swarm:
        with pytest.raises(PetalsError, match="3:9"):
            await swarm.add(BlockSpan(3, 9))
        assert len(swarm.peers) == 1


async def test_models_need_a_swarm_beside_the_callers_loop(llama: Path) -> None:
    async with InProcessSwarm(llama, HEAD) as swarm:
        with pytest.raises(AssertionError, match="`with`"):
            swarm.model()
