"""The in-process swarm as tests want it: small servers, quick clients, the whole model beside."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.client.routing.sequence_manager import SwarmConnection
from petals.models.loading.split import load_blocks
from petals.models.runtime.span import Span
from petals.models.verify.tiny import HIDDEN_SIZE, NUM_BLOCKS
from petals.server.config import (
    ClientLimits,
    ComputeConfig,
    LimitsConfig,
    MemoryConfig,
    ServerConfig,
    SourceConfig,
)
from petals.server.policies import SchedulerConfig
from petals.swarm.failover_config import FailoverConfig
from petals.testing.in_process_swarm import InProcessSwarm
from petals.types import BlockSpan
from support.clients import QUICK, client_options

ALL = BlockSpan(0, NUM_BLOCKS)
HIDDEN = HIDDEN_SIZE


class RealSwarm(InProcessSwarm):
    """With the whole model at hand to compare with."""

    @cached_property
    def local(self) -> PreTrainedModel:
        """The model as transformers runs it, in the servers' dtype, without gradients."""
        dtype = getattr(torch, self.server_config.compute.dtype)
        folder = self.server_config.source.model
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval().requires_grad_(False)

    @cached_property
    def _span(self) -> Span:
        return Span(load_blocks(self.server_config.source.model, ALL))

    def connection(self, **options: Any) -> SwarmConnection:
        """As that of InProcessSwarm; options of FailoverConfig are taken as well."""
        return super().connection(**client_options(**options))

    def expected(self, row: torch.Tensor) -> torch.Tensor:
        """A whole row [n, H] through all blocks, without any cache."""
        return self._span.reference(row)


def real_swarm(
    folder: Path,
    *spans: BlockSpan,
    cache_tokens: int = 512,
    outbox_bytes: int | None = None,
    max_step_tokens: int = 16,
    lease_seconds: float = 60.0,
    drain_seconds: float = 60.0,
    adapters: tuple[str, ...] = (),
    dtype: str = "float32",
    client: Mapping[str, Any] = MappingProxyType({}),
    scheduling: SchedulerConfig | None = None,
    **failover: object,
) -> RealSwarm:
    """Small servers of the model in ``folder``: enter it with ``async with`` or ``with``.

    ``client``: fields of all clients' ClientConfig; ``failover``: of all servers' FailoverConfig.
    """
    server = ServerConfig(
        source=SourceConfig(model=str(folder), adapters=adapters),
        compute=ComputeConfig(device="cpu", num_threads=1, dtype=dtype),
        memory=MemoryConfig(
            cache_tokens=cache_tokens, outbox_bytes=outbox_bytes, check_integrity=True
        ),
        limits=LimitsConfig(max_length=64, max_step_tokens=max_step_tokens),
        clients=ClientLimits(replay_chunk_tokens=16, lease_seconds=lease_seconds),
        failover=FailoverConfig(**({"check_integrity": True} | failover)),
        scheduling=scheduling or SchedulerConfig(),
        drain_seconds=drain_seconds,
    )
    return RealSwarm(server, *spans, client=QUICK | client_options(**client))
