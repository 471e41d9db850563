"""Servers that nobody can dial, over a network in memory: they find out, and serve all the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petals.client.session.rows import SessionRows
from petals.client.trace import Way
from petals.swarm.identity import load_or_create_identity
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId
from support.swarm import ALL, RealSwarm, real_swarm, states

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=5)


async def add_hidden(swarm: RealSwarm, span: BlockSpan, file: Path) -> PeerId:
    """A server that was behind a NAT from its first moment on."""
    swarm.net.hide(load_or_create_identity(file).peer_id)
    before = swarm.base
    swarm.base = replace(before, network=replace(before.network, identity_path=file))
    try:
        return await swarm.add(span)
    finally:
        swarm.base = before


async def test_two_that_nobody_can_dial_serve_through_relays(folder: Path, tmp_path: Path) -> None:
    async with real_swarm(folder, BlockSpan(0, 2)) as swarm:
        hidden = [
            await add_hidden(swarm, BlockSpan(2, 4), tmp_path / "one"),
            await add_hidden(swarm, BlockSpan(4, 5), tmp_path / "two"),
        ]
        view = await swarm.client.directory.view(swarm.model, 5)
        relayed = {peer for peer, record in view.records.items() if record.relayed}
        assert relayed == set(hidden)
        access = swarm.access()
        session = SessionRows(access, ALL, max_length=60)
        text = states(12, 1)
        output = await session.step(text, (0,), (12,))
        torch.testing.assert_close(output, swarm.expected(text), rtol=1e-4, atol=1e-5)
        trace = session.trace
        assert [edge.way for edge in trace.edges] == [Way.RELAYED, Way.RELAYED]
        assert [hop.is_relayed for hop in trace.hops] == [False, True, True]
        await session.close()
        await access.close()


async def test_who_hides_hands_on_to_others_directly(folder: Path, tmp_path: Path) -> None:
    async with real_swarm(folder, BlockSpan(2, 5)) as swarm:
        await add_hidden(swarm, BlockSpan(0, 2), tmp_path / "one")
        access = swarm.access()
        session = SessionRows(access, ALL, max_length=60)
        await session.step(states(3), (0,), (3,))
        assert [edge.way for edge in session.trace.edges] == [Way.DIRECT]
        assert [hop.is_relayed for hop in session.trace.hops] == [True, False]
        await session.close()
        await access.close()


async def test_a_relay_that_ends_its_circuits_ends_no_session(folder: Path, tmp_path: Path) -> None:
    """Relays allow a circuit some minutes and some bytes."""
    async with real_swarm(folder, BlockSpan(0, 2)) as swarm:
        hidden = [
            await add_hidden(swarm, BlockSpan(2, 4), tmp_path / "one"),
            await add_hidden(swarm, BlockSpan(4, 5), tmp_path / "two"),
        ]
        access = swarm.access()
        session = SessionRows(access, ALL, max_length=60)
        text = states(18, 1)
        expected = swarm.expected(text)
        for start in range(0, 18, 3):
            output = await session.step(text[start : start + 3], (start,), (3,))
            wanted = expected[start : start + 3]
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
            for peer in hidden[: start // 6]:
                swarm.net.transports[peer].break_streams()
        assert [hop.peer_id for hop in session.trace.hops[1:]] == hidden
        assert not session.trace.repairs
        await session.close()
        await access.close()
