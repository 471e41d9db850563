"""Servers that nobody can dial, over a network in memory: they find out, and serve all the same."""

from dataclasses import replace
from pathlib import Path

from petals.client.trace import Way
from petals.swarm.identity import load_or_create_identity
from petals.types import BlockSpan, PeerId
from support.reference import assert_close, states
from support.swarm import NUM_BLOCKS, RealSwarm, real_swarm


async def add_hidden(swarm: RealSwarm, span: BlockSpan, file: Path) -> PeerId:
    """A server that was behind a NAT from its first moment on."""
    swarm.net.hide(load_or_create_identity(file).peer_id)
    return await swarm.add(span, network=replace(swarm.server_config.network, identity_path=file))


async def test_two_that_nobody_can_dial_serve_through_relays(llama: Path, tmp_path: Path) -> None:
    async with real_swarm(llama, BlockSpan(0, 2)) as swarm:
        hidden = [
            await add_hidden(swarm, BlockSpan(2, 4), tmp_path / "one"),
            await add_hidden(swarm, BlockSpan(4, 5), tmp_path / "two"),
        ]
        view = await swarm.node.directory.view(swarm.model_id, NUM_BLOCKS)
        relayed = {peer for peer, record in view.records.items() if record.relayed}
        assert relayed == set(hidden)
        async with swarm.session(max_length=60) as session:
            text = states(12, 1)
            assert_close(await session.step(text, (0,), (12,)), swarm.expected(text))
            trace = session.trace
            assert [edge.way for edge in trace.edges] == [Way.RELAYED, Way.RELAYED]
            assert [hop.is_relayed for hop in trace.hops] == [False, True, True]


async def test_who_hides_hands_on_to_others_directly(llama: Path, tmp_path: Path) -> None:
    async with real_swarm(llama, BlockSpan(2, 5)) as swarm:
        await add_hidden(swarm, BlockSpan(0, 2), tmp_path / "one")
        async with swarm.session(max_length=60) as session:
            await session.step(states(3), (0,), (3,))
            assert [edge.way for edge in session.trace.edges] == [Way.DIRECT]
            assert [hop.is_relayed for hop in session.trace.hops] == [True, False]


async def test_a_relay_that_ends_its_circuits_ends_no_session(llama: Path, tmp_path: Path) -> None:
    """Relays allow a circuit some minutes and some bytes."""
    async with real_swarm(llama, BlockSpan(0, 2)) as swarm:
        hidden = [
            await add_hidden(swarm, BlockSpan(2, 4), tmp_path / "one"),
            await add_hidden(swarm, BlockSpan(4, 5), tmp_path / "two"),
        ]
        text = states(18, 1)
        expected = swarm.expected(text)
        async with swarm.session(max_length=60) as session:
            for start in range(0, 18, 3):
                output = await session.step(text[start : start + 3], (start,), (3,))
                assert_close(output, expected[start : start + 3])
                for peer in hidden[: start // 6]:
                    swarm.net.transports[peer].break_streams()
            assert [hop.peer_id for hop in session.trace.hops[1:]] == hidden
            assert not session.trace.repairs
