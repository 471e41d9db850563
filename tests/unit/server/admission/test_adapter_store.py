"""Who may use which adapter, and when it goes."""

import pytest
import torch

from petals.errors import AdapterRefused, PeerBusy, UnknownAdapter
from petals.models.adapters.low_rank import Adapter, LowRank
from petals.server.admission.adapter_store import AdapterStore
from petals.server.config import ClientLimits
from petals.testing.manual_clock import ManualClock
from petals.types import PeerId

ANNA, BEN = PeerId("anna"), PeerId("ben")


def adapter(kilobytes: int = 100) -> Adapter:
    a = torch.zeros(1, kilobytes * 128)
    return Adapter({(0, "q"): LowRank(a, a.t(), 1.0)})


def store(clock: ManualClock | None = None, per_peer: int = 256, in_all: int = 600) -> AdapterStore:
    config = ClientLimits(
        lease_seconds=60.0,
        max_adapter_bytes_per_peer=per_peer * 1024,
        max_adapter_bytes=in_all * 1024,
    )
    return AdapterStore(config, clock or ManualClock())


def test_what_a_client_has_put_is_for_that_client_alone() -> None:
    adapters = store()
    mine = adapter()
    adapters.put(ANNA, "x", mine)
    with adapters.using(ANNA, "x") as found:
        assert found is mine
    with pytest.raises(UnknownAdapter), adapters.using(BEN, "x"):
        pass


def test_what_the_operator_preloads_is_for_every_client() -> None:
    adapters = store()
    poems = adapter(10_000)
    adapters.preload("poems", poems)
    for peer in (ANNA, BEN):
        with adapters.using(peer, "poems") as found:
            assert found is poems
    with pytest.raises(UnknownAdapter) as caught, adapters.using(ANNA, "prose"):
        pass
    assert "poems" in caught.value.hint
    with adapters.using(ANNA, None) as nothing:
        assert nothing is None


async def test_the_lease_begins_after_the_last_use() -> None:
    clock = ManualClock()
    adapters = store(clock)
    adapters.put(ANNA, "x", adapter())
    with adapters.using(ANNA, "x"):
        await clock.advance(1000)
        adapters.drop_unused()
        assert adapters.num_bytes
    await clock.advance(50)
    adapters.drop_unused()
    assert adapters.has(ANNA, "x")
    await clock.advance(61)
    adapters.drop_unused()
    assert not adapters.has(ANNA, "x")
    assert adapters.num_bytes == 0


async def test_the_longest_unused_makes_room() -> None:
    clock = ManualClock()
    adapters = store(clock)
    for name in ("x", "y"):
        adapters.put(ANNA, name, adapter())
        await clock.advance(1)
    assert adapters.has(ANNA, "x")
    await clock.advance(1)
    adapters.put(ANNA, "z", adapter())
    assert [adapters.has(ANNA, name) for name in "xyz"] == [True, False, True]


def test_nothing_in_use_is_dropped() -> None:
    adapters = store()
    for name in ("x", "y"):
        adapters.put(ANNA, name, adapter())
    with adapters.using(ANNA, "y"):
        with adapters.using(ANNA, "x"), pytest.raises(PeerBusy):
            adapters.put(ANNA, "z", adapter())
        assert [adapters.has(ANNA, name) for name in "xyz"] == [True, True, False]
        adapters.put(ANNA, "z", adapter())
    assert [adapters.has(ANNA, name) for name in "xyz"] == [False, True, True]


def test_clients_share_the_room_in_all() -> None:
    adapters = store(in_all=256)
    adapters.put(ANNA, "x", adapter())
    adapters.put(BEN, "x", adapter())
    with adapters.using(BEN, "x"):
        adapters.put(BEN, "y", adapter(60))
        assert not adapters.has(ANNA, "x")
        with pytest.raises(PeerBusy):
            adapters.put(ANNA, "z", adapter(180))
        assert adapters.has(BEN, "y")


def test_what_never_fits_is_refused() -> None:
    adapters = store()
    with pytest.raises(AdapterRefused):
        adapters.put(ANNA, "x", adapter(300))
    one = LowRank(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    many = Adapter({(block, "q"): one for block in range(99)})
    with pytest.raises(AdapterRefused):
        store(per_peer=100).put(ANNA, "x", many)
    assert adapters.num_bytes == 0
