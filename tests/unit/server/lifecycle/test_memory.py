from pathlib import Path

import pytest

from petals.errors import ConfigError
from petals.models.loading.cost import BlockCost
from petals.server.lifecycle.memory import (
    DEFAULT_CACHE_TOKENS,
    LEAST_CACHE_TOKENS,
    RESERVE_BYTES,
    Capacity,
    free_memory_bytes,
    plan_capacity,
)

GB = 10**9


def block(weight_bytes: int, kv_bytes: int = 10_000) -> BlockCost:
    return BlockCost(
        num_parameters=1,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        window_tokens=None,
        flops_per_token=1,
    )


BLOCKS = [block(GB)] * 5 + [block(2 * GB)] * 5
CACHE = DEFAULT_CACHE_TOKENS * 10_000


@pytest.mark.parametrize(
    ("free_bytes", "asked", "planned"),
    [
        # A block is counted at the price of the dearest.
        (3 * (2 * GB + CACHE), {}, Capacity(3, DEFAULT_CACHE_TOKENS)),
        (3 * (2 * GB + CACHE) - 1, {}, 2),
        # Never more blocks than the model has.
        (1000 * GB, {}, 10),
        # A number of blocks is kept, and the cache gets the rest.
        (4 * 2 * GB + 4 * 5000 * 10_000, {"num_blocks": 4}, Capacity(4, 5000)),
        # One block may have a small cache.
        (2 * GB + LEAST_CACHE_TOKENS * 10_000, {}, Capacity(1, LEAST_CACHE_TOKENS)),
    ],
)
def test_as_many_blocks_as_fit(
    free_bytes: int, asked: dict[str, int], planned: Capacity | int
) -> None:
    found = plan_capacity(BLOCKS, RESERVE_BYTES + free_bytes, **asked)
    assert planned in (found, found.num_blocks)


@pytest.mark.parametrize("num_blocks", [None, 1, 4])
def test_what_does_not_fit_is_refused(num_blocks: int | None) -> None:
    with pytest.raises(ConfigError, match="are free") as caught:
        plan_capacity(BLOCKS, RESERVE_BYTES + 2 * GB, num_blocks=num_blocks)
    assert "--num-blocks" in caught.value.hint


def test_a_cache_that_was_asked_for_is_what_is_planned() -> None:
    free_bytes = RESERVE_BYTES + 10 * 2 * GB
    assert plan_capacity(BLOCKS, free_bytes, cache_tokens=100).cache_tokens == 100


def test_blocks_without_cache_can_be_planned() -> None:
    assert plan_capacity([block(GB, 0)], RESERVE_BYTES + 2 * GB).num_blocks == 1


def write_limit(folder: Path, most: str, used: int, droppable: int) -> None:
    (folder / "memory.max").write_text(most)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\n")


@pytest.mark.parametrize(
    ("most", "used", "droppable", "free"),
    [("1000000", 700_000, 200_000, 500_000), ("1000", 2000, 0, 0)],
    ids=["a part is used", "used up"],
)
def test_the_limit_of_a_container_counts(
    most: str, used: int, droppable: int, free: int, tmp_path: Path
) -> None:
    write_limit(tmp_path, most, used, droppable)
    assert free_memory_bytes("cpu", tmp_path) == free


def test_no_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    write_limit(tmp_path, "max", 700_000, 0)
    assert free_memory_bytes("cpu", tmp_path) > 2**20
    assert free_memory_bytes("cpu", tmp_path / "absent") > 2**20


def test_the_older_layout_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("900000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("300000\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 1000\n")
    assert free_memory_bytes("cpu", tmp_path) == 601_000
