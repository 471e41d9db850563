"""Blocks as a list, as a module, and in sessions of their own."""

import pytest
import torch

from petals.client.config import ClientConfig
from petals.client.model.remote_sequential import RemoteSequential
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import BadInput, ConfigError, LengthExceeded, NotSupported, SessionClosed
from petals.types import BlockSpan
from support.local_blocks import tiny_pair

HIDDEN = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def blocks():
    return tiny_pair("llama")[1].model.layers


def test_is_a_list_of_blocks(blocks):
    assert len(blocks) == 5
    assert [str(block.blocks) for block in blocks] == ["0:1", "1:2", "2:3", "3:4", "4:5"]
    assert str(blocks[1:4].blocks) == "1:4"
    assert str(blocks[1:4][1:].blocks) == "2:4"
    assert str(blocks[-1].blocks) == "4:5"
    assert str(blocks[3:100].blocks) == "3:5"
    assert len(blocks[2:2]) == 0
    assert blocks[-1].extra_repr() == "blocks=4:5"
    with pytest.raises(IndexError):
        blocks[5]
    with pytest.raises(NotSupported, match="order"):
        blocks[::2]


def test_has_no_parameters(blocks):
    assert list(blocks.parameters()) == []
    assert list(blocks.state_dict()) == []


def test_any_path_through_the_blocks_is_the_whole(blocks):
    with torch.no_grad():
        whole = blocks(HIDDEN)
        parts = blocks[3:](blocks[1:3](blocks[:1](HIDDEN)))
        one_by_one = HIDDEN
        for block in blocks:
            one_by_one = block(one_by_one)
    assert whole.shape == HIDDEN.shape
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one_by_one, whole, rtol=1e-5, atol=1e-6)


def test_no_blocks_change_nothing(blocks):
    assert torch.equal(blocks[2:2](HIDDEN), HIDDEN)


def test_a_session_of_a_slice(blocks):
    part = blocks[2:5]
    with torch.no_grad(), part.inference_session(max_length=6) as session:
        assert part.active_session is session
        assert blocks.active_session is None
        pieces = [part(HIDDEN[:, :4]), part(HIDDEN[:, 4:5])]
        assert part.position == 5
        session.position = 4
        pieces[1:] = [part(HIDDEN[:, 4:])]
        with pytest.raises(LengthExceeded):
            part(HIDDEN[:, :1])
    assert part.active_session is None
    assert part.position == 0
    with pytest.raises(SessionClosed):
        session.step(HIDDEN)
    torch.testing.assert_close(torch.cat(pieces, dim=1), part(HIDDEN), rtol=1e-5, atol=1e-6)


def test_sessions_nest(blocks):
    with blocks.inference_session(max_length=4) as outer:
        with blocks.inference_session(max_length=4) as inner:
            assert blocks.active_session is inner
        with blocks.use_session(None):
            assert blocks.active_session is None
        assert blocks.active_session is outer


def test_a_session_is_closed_when_its_block_raises(blocks):
    with pytest.raises(KeyError), blocks.inference_session(max_length=4) as session:
        raise KeyError
    with pytest.raises(SessionClosed):
        session.step(HIDDEN)


def test_keeps_dtype(blocks):
    assert blocks(HIDDEN.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [HIDDEN[0], torch.zeros(1, 2, 32, dtype=torch.int64)],
    ids=["two-dimensions", "integers"],
)
def test_wrong_inputs(blocks, wrong):
    with pytest.raises(BadInput, match="hidden states"):
        blocks(wrong)


def test_the_old_way_to_make_one():
    config = tiny_pair("llama")[0].config
    config.initial_peers, config.dht_prefix = ["/ip4/127.0.0.1/tcp/1"], "some-model"
    blocks = RemoteSequential(config, start_block=1, end_block=4)
    assert len(blocks) == 3
    with pytest.raises(ConfigError, match="0:5, not 3:6"):
        RemoteSequential(config, start_block=3, end_block=6)
    assert blocks.sequence_manager.block_uids == tuple(f"some-model.{i}" for i in (1, 2, 3))
    assert blocks[1:].sequence_manager.block_uids == ("some-model.2", "some-model.3")


def test_the_blocks_of_a_manager():
    config = tiny_pair("llama")[0].config
    with RemoteSequenceManager(ClientConfig(dht_prefix="m"), BlockSpan(0, 5)) as manager:
        blocks = RemoteSequential(config, sequence_manager=manager[1:4])
        assert [str(part.blocks) for part in blocks] == ["1:2", "2:3", "3:4"]
        assert blocks.sequence_manager.access is manager.access
        blocks = RemoteSequential(config, sequence_manager=manager)
        assert blocks.sequence_manager is manager
        for more in ({"start_block": 1}, {"end_block": 2}, {"dht": object()}):
            with pytest.raises(ConfigError, match="no effect on a given sequence_manager"):
                RemoteSequential(config, sequence_manager=manager, **more)


def test_a_dht_names_the_swarm():
    class Dht:
        initial_peers = ["/ip4/192.0.2.1/tcp/1"]
        client_mode = True

    config = tiny_pair("llama")[0].config
    config.dht_prefix = "some-model"
    blocks = RemoteSequential(config, dht=Dht())
    assert blocks.sequence_manager.config.initial_peers == ("/ip4/192.0.2.1/tcp/1",)
    assert blocks.sequence_manager.dht.client_mode
    Dht.client_mode, Dht.get_visible_maddrs = False, lambda self: ["/ip4/192.0.2.2/tcp/1"]
    manager = RemoteSequential(config, dht=Dht(), start_block=3).sequence_manager
    assert manager.config.initial_peers == ("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/1")
    with pytest.raises(ConfigError, match="names no peers") as refusal:
        RemoteSequential(config, dht=object())
    assert "initial_peers" in refusal.value.hint
