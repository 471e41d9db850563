"""How much memory is really free here, and what of a model fits into it.

Free means now, for this process: other programs and the limits of containers count. Knows prices
(``models.cost``) and budgets, no sessions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from petals.errors import ConfigError
from petals.models.loading.cost import BlockCost

DEFAULT_CACHE_TOKENS = 16384
LEAST_CACHE_TOKENS = 2048
DEFAULT_TRAINING_BYTES = 2**30
"""At most so much for what passes keep for their way back."""

RESERVE_BYTES = 700 * 2**20
"""Kept for the runtime itself, activations and what the machine does beside us."""

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, usage and the part of it that can be dropped, in versions 2 and 1 of cgroups."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits: so many blocks, and a cache of so many tokens for each of them."""

    num_blocks: int
    cache_tokens: int


def free_memory_bytes(device: str, cgroup: Path = _CGROUP) -> int:
    """Bytes that can still be taken on ``device`` ("cpu", "cuda:0", "mps")."""
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
    """How many blocks fit into ``free_bytes``, and how much cache beside them.

    Given numbers are kept. Blocks are counted at the price of the dearest. Raises ConfigError if
    not even one block fits, or not those asked for.
    """
    room = free_bytes - RESERVE_BYTES
    weight = max(cost.weight_bytes for cost in costs)
    per_token = max(cost.kv_bytes_per_token for cost in costs)
    tokens = cache_tokens or DEFAULT_CACHE_TOKENS
    if num_blocks is None:
        # One block may do with less cache than several would be given.
        num_blocks = max(1, room // max(1, weight + tokens * per_token))
    num_blocks = min(num_blocks, len(costs))
    left = room - num_blocks * weight
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
    """Bytes left under a container's limit, None where there is no limit."""
    try:
        most = int((root / limit).read_text())
        used = int((root / usage).read_text())
        stat = (root / limit).with_name("memory.stat").read_text()
    except (OSError, ValueError):
        return None
    words = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    return max(0, most - used + int(words.get(droppable, 0)))
