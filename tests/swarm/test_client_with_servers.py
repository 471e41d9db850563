"""Client and servers, both real, over a network in memory: the numbers are the whole model's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from petals.client.forward import run_rows
from petals.client.sequence_manager import SwarmAccess
from petals.client.session_rows import SessionRows
from petals.errors import CacheFull, LengthExceeded, RequestTooLarge, UnknownAdapter
from petals.models.span import Span
from petals.models.split import load_blocks
from petals.server.config import ComputeConfig, LimitsConfig, MemoryConfig, ServerConfig
from petals.server.config import SourceConfig as Source
from petals.server.server import OnlineInfo, Server, Watchers
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.memory_net import MemoryNet
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from served_span import assert_close
from toy_blocks import config

ALL = BlockSpan(0, 5)
HIDDEN = 32


@dataclass
class Swarm:
    net: MemoryNet
    client: SwarmNode
    model: str
    local: Span

    def access(self, **options: object) -> SwarmAccess:
        return SwarmAccess(config(**options), self.model, 5, self.client)

    def expected(self, row: torch.Tensor) -> torch.Tensor:
        return self.local.reference(row)


def states(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bloom"), "bloom", num_hidden_layers=5)


@asynccontextmanager
async def real_swarm(
    folder: Path, *spans: BlockSpan, cache_tokens: int = 512
) -> AsyncIterator[Swarm]:
    net = MemoryNet()
    async with SwarmNode(NodeConfig(), engine=net.engine) as seed:
        base = ServerConfig(
            source=Source(model=str(folder)),
            compute=ComputeConfig(device="cpu", num_threads=1),
            memory=MemoryConfig(cache_tokens=cache_tokens),
            limits=LimitsConfig(max_length=64, max_step_tokens=16),
            network=NodeConfig(initial_peers=await seed.addresses()),
        )
        running, model = [], ""
        for span in spans:
            came: asyncio.Future[OnlineInfo] = asyncio.get_running_loop().create_future()
            server = Server(
                replace(base, blocks=span), Watchers(on_online=came.set_result), engine=net.engine
            )
            task = asyncio.create_task(server.run())
            await asyncio.wait({task, came}, return_when=asyncio.FIRST_COMPLETED)
            running.append((server, task))
            model = came.result().model
        network = NodeConfig(initial_peers=await seed.addresses(), client_mode=True)
        async with SwarmNode(network, engine=net.engine) as client:
            yield Swarm(net, client, model, Span(load_blocks(str(folder), ALL)))
        for server, task in running:
            server.stop()
            await task


async def test_the_whole_model_by_three_overlapping_servers(folder: Path) -> None:
    spans = (BlockSpan(0, 2), BlockSpan(1, 4), BlockSpan(3, 5))
    async with real_swarm(folder, *spans) as swarm:
        access = swarm.access()
        session = SessionRows(access, ALL, max_length=60)
        one, two = states(40, seed=1), states(33, seed=2)
        parts = [await session.step(torch.cat([one[:38], two[:30]]), (0, 0), (38, 30))]
        row_one, row_two = [parts[0][:38]], [parts[0][38:]]
        for at in range(2):
            step = torch.cat([one[38 + at : 39 + at], two[30 + at : 31 + at]])
            output = await session.step(step, (38 + at, 30 + at), (1, 1))
            row_one.append(output[:1])
            row_two.append(output[1:])
        assert_close(torch.cat(row_one), swarm.expected(one))
        assert_close(torch.cat(row_two), swarm.expected(two[:32]))
        new = states(3, seed=3)
        output = await session.step(new, (32, 10, 40), (1, 1, 1), reorder=(1, 0, 0))
        kept = [two[:32], one[:10], one]
        for number, row in enumerate(kept):
            whole = swarm.expected(torch.cat([row, new[number : number + 1]]))
            assert_close(output[number : number + 1], whole[len(row) :])
        assert len(session.trace.hops) >= 3
        await session.close()
        rows = torch.cat([one[:9], two[:7]])
        output = await run_rows(access, ALL, rows, (9, 7))
        assert_close(output[:9], swarm.expected(one[:9]))
        assert_close(output[9:], swarm.expected(two[:7]))
        await access.close()


async def test_refusals(folder: Path) -> None:
    async with real_swarm(folder, BlockSpan(0, 3), BlockSpan(3, 5), cache_tokens=64) as swarm:
        access = swarm.access(alloc_timeout=0.05)

        async def first_step(max_length: int, rows: int = 1) -> SessionRows:
            session = SessionRows(access, ALL, max_length=max_length)
            try:
                await session.step(states(rows), (0,) * rows, (1,) * rows)
            except BaseException:
                await session.close()
                raise
            return session

        with pytest.raises(LengthExceeded):
            await first_step(65)
        with pytest.raises(RequestTooLarge):
            await first_step(64, rows=2)
        holder = await first_step(64)
        with pytest.raises(CacheFull):
            await first_step(16)
        await holder.close()
        await (await first_step(64)).close()
        access = swarm.access(active_adapter="poems")
        with pytest.raises(UnknownAdapter):
            await first_step(16)


async def test_clients_take_turns_in_small_pools(folder: Path) -> None:
    async with real_swarm(folder, BlockSpan(0, 3), BlockSpan(2, 5), cache_tokens=32) as swarm:
        access = swarm.access(alloc_timeout=60.0)

        async def client(number: int) -> None:
            text = states(8, seed=number)
            session = SessionRows(access, ALL, max_length=32)
            output = await session.step(text, (0,), (8,))
            await session.close()
            assert_close(output, swarm.expected(text))

        await asyncio.gather(*(client(number) for number in range(5)))
