"""How much memory is free on this machine, and how many blocks of a model fit into it.

"Free" is what this process can allocate now: other programs and the limits of containers count.
Knows the costs of blocks (``models.loading.cost``) and budgets; knows no sessions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from petals.errors import ConfigError
from petals.models.loading.cost import BlockCost

DEFAULT_CACHE_TOKENS = 16384
"""KV budget in tokens of each block, where memory allows it."""

LEAST_CACHE_TOKENS = 2048
"""Smallest KV budget (tokens of each block) beside which one more block is served."""

DEFAULT_TRAINING_BYTES = 2**30
"""Upper limit of the activation budget if the operator sets none."""

RESERVE_BYTES = 700 * 2**20
"""Left for the runtime, the activations of a batch, and other programs."""

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of the limit and the usage, and the field of memory.stat that counts reclaimable bytes of
the usage: in version 2 and in version 1 of cgroups.
"""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits: ``num_blocks`` blocks and a KV cache of ``cache_tokens`` tokens in each."""

    num_blocks: int
    cache_tokens: int


def free_memory_bytes(device: str, cgroup: Path = _CGROUP) -> int:
    """Bytes that can be allocated on ``device`` ("cpu", "cuda:0", "mps")."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limits = [left for files in _CGROUP_FILES if (left := _cgroup_left(cgroup, *files)) is not None]
    return min([free, *limits])


def plan_capacity(
    costs: Sequence[BlockCost],
    free_bytes: int,
    *,
    num_blocks: int | None = None,
    cache_tokens: int | None = None,
) -> Capacity:
    """How many blocks fit into ``free_bytes``, and how much KV cache beside them.

    ``num_blocks`` and ``cache_tokens`` are kept if given. Every block is assumed to be as large as
    the largest. Raises ConfigError if not even one block fits, or not ``num_blocks``.
    """
    usable = free_bytes - RESERVE_BYTES
    weight = max(cost.weight_bytes for cost in costs)
    per_token = max(cost.kv_bytes_per_token for cost in costs)
    tokens = cache_tokens or DEFAULT_CACHE_TOKENS
    if num_blocks is None:
        # At least one: a single block may have less cache than DEFAULT_CACHE_TOKENS.
        num_blocks = max(1, usable // max(1, weight + tokens * per_token))
    num_blocks = min(num_blocks, len(costs))
    left = usable - num_blocks * weight
    if cache_tokens is None and per_token:
        tokens = min(tokens, max(0, left) // (num_blocks * per_token))
    if left <= 0 or (cache_tokens is None and tokens < LEAST_CACHE_TOKENS):
        raise ConfigError(
            f"{num_blocks} blocks need {num_blocks * weight / 1e9:.1f} GB and some cache, "
            f"{free_bytes / 1e9:.1f} GB are free.",
            hint="Serve fewer blocks (--num-blocks), narrower ones (--dtype int8), or free memory.",
        )
    return Capacity(num_blocks, tokens)


def _cgroup_left(root: Path, limit: str, usage: str, droppable: str) -> int | None:
    """Bytes left under a container's limit; None if there is no limit."""
    try:
        most = int((root / limit).read_text())
        used = int((root / usage).read_text())
        stat = (root / limit).with_name("memory.stat").read_text()
    except (OSError, ValueError):
        return None
    fields = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    return max(0, most - used + int(fields.get(droppable, 0)))
