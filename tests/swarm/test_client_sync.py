"""The synchronous side: managers and sessions as scripts use them, from any thread."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import pytest
import torch

from petals.client.connection.event_loop import client_loop
from petals.client.model.inference_session import InferenceSession
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.training.autograd import run_whole
from petals.client.training.hop_call import PassCall
from petals.errors import (
    BadInput,
    ConfigError,
    LengthExceeded,
    MissingBlocksError,
    NotSupported,
    SessionClosed,
    SessionGap,
    SwarmError,
)
from petals.types import BlockSpan
from support.fake_server import (
    HIDDEN,
    MODEL,
    ToyAdapter,
    ToySwarm,
    config,
    expected,
    run_call,
    states,
    toy_swarm,
)

ALL = BlockSpan(0, 4)


@pytest.fixture
def swarm() -> Iterator[ToySwarm]:
    stack = AsyncExitStack()
    try:
        yield client_loop.run(stack.enter_async_context(toy_swarm((0, 2), (2, 4))))
    finally:
        client_loop.run(stack.aclose())


@pytest.fixture
def manager(swarm: ToySwarm) -> Iterator[RemoteSequenceManager]:
    uids = [f"{MODEL}.{block}" for block in range(4)]
    with RemoteSequenceManager(config(), uids, node=swarm.client) as manager:
        yield manager


def batch(*seeds: int, tokens: int = 3) -> torch.Tensor:
    return torch.stack([states(tokens, seed=seed) for seed in seeds])


def whole(inputs: torch.Tensor, blocks: BlockSpan = ALL) -> torch.Tensor:
    return torch.stack([expected(row, blocks) for row in inputs])


def test_step_roll_back_and_go_on(manager: RemoteSequenceManager) -> None:
    text = batch(1, 2, tokens=8)
    with InferenceSession(manager, max_length=10) as session:
        assert (session.position, session.num_rows, session.num_blocks) == (0, None, 4)
        first = session.step(text[:, :5])
        rest = session.step(text[:, 5:])
        torch.testing.assert_close(torch.cat([first, rest], 1), whole(text))
        assert (session.position, session.num_rows, session.max_length) == (8, 2, 10)
        session.position = 4
        other = batch(7, 8, tokens=2)
        output = session.step(other)
        torch.testing.assert_close(output, whole(torch.cat([text[:, :4], other], 1))[:, 4:])
        with pytest.raises(SessionGap):
            session.position = 7
        with pytest.raises(LengthExceeded):
            session.step(batch(1, 2, tokens=5))


def test_hypotheses_change_places(manager: RemoteSequenceManager) -> None:
    text, new = batch(1, 2, 3), batch(4, 5, 6, tokens=1)
    with InferenceSession(manager, max_length=10) as session:
        session.step(text)
        output = session.step(new, hypo_ids=torch.tensor([2, 2, 0]))
        wanted = whole(torch.cat([text[[2, 2, 0]], new], 1))[:, 3:]
        torch.testing.assert_close(output, wanted)
        session.step(new, hypo_ids=torch.tensor([0, 1, 2]))
        with pytest.raises(BadInput):
            session.step(new, hypo_ids=torch.tensor([0, 1, 3]))


def test_a_batch_grows_by_a_reorder(manager: RemoteSequenceManager) -> None:
    text, new = batch(1), batch(4, 5, tokens=1)
    with InferenceSession(manager, max_length=10) as session:
        session.step(text)
        output = session.step(new, hypo_ids=torch.tensor([0, 0]))
        wanted = whole(torch.cat([text[[0, 0]], new], 1))[:, 3:]
        torch.testing.assert_close(output, wanted)


def test_zero_tokens(manager: RemoteSequenceManager) -> None:
    with InferenceSession(manager, max_length=10) as session:
        assert session.step(torch.empty(2, 0, HIDDEN)).shape == (2, 0, HIDDEN)
        assert session.num_rows == 2
        torch.testing.assert_close(session.step(batch(1, 2)), whole(batch(1, 2)))


def test_wrong_input(manager: RemoteSequenceManager) -> None:
    with InferenceSession(manager, max_length=10) as session:
        with pytest.raises(NotSupported):
            session.step(batch(1), prompts=torch.ones(4, 1, 2, HIDDEN))
        with pytest.raises(BadInput, match=r"inputs\[None\]"):
            session.step(states(3))
        with pytest.raises(BadInput):
            session.last_token_id = torch.tensor([[1]])
    with pytest.raises(SessionClosed):
        session.step(batch(1))
    with pytest.raises(BadInput):
        InferenceSession(manager, max_length=0)


def test_output_ids_are_kept(manager: RemoteSequenceManager) -> None:
    with InferenceSession(manager, max_length=10) as session:
        assert session.last_token_id is None
        session.output_ids = torch.tensor([[3, 4]])
        session.last_token_id = torch.tensor([[9]])
        assert session.output_ids.tolist() == [[3, 9]]


def test_gradients_do_not_follow_into_a_session(manager: RemoteSequenceManager) -> None:
    with InferenceSession(manager, max_length=10) as session:
        assert not session.step(batch(1).requires_grad_()).requires_grad


def test_a_forgotten_session_is_closed(swarm: ToySwarm, manager: RemoteSequenceManager) -> None:
    session = InferenceSession(manager, max_length=10)
    session.step(batch(1))
    assert not client_loop.run(swarm.at_rest())
    server = swarm.servers[0]
    del session
    gc.collect()
    client_loop.run(server.until(lambda: not server.sessions))


def test_slices_are_paths_of_their_own(manager: RemoteSequenceManager) -> None:
    part = manager[1:3]
    assert (len(part), part.block_uids, part[1].blocks) == (2, ("toy.1", "toy.2"), BlockSpan(2, 3))
    assert [one.blocks.start for one in manager] == [0, 1, 2, 3]
    assert manager[-1].blocks == BlockSpan(3, 4)
    with InferenceSession(part, max_length=10) as session:
        torch.testing.assert_close(session.step(batch(1)), whole(batch(1), BlockSpan(1, 3)))
    with InferenceSession(manager[:1], max_length=10) as session:
        torch.testing.assert_close(session.step(batch(1)), whole(batch(1), BlockSpan(0, 1)))
    with pytest.raises(ConfigError):
        manager[::2]
    with pytest.raises(IndexError):
        manager[4]


def test_routes_can_be_looked_at(swarm: ToySwarm, manager: RemoteSequenceManager) -> None:
    manager.update()
    one, other = swarm.servers
    assert [hop.peer_id for hop in manager.make_sequence()] == [one.peer_id, other.peer_id]
    (hop,) = manager[1:].make_sequence(1, mode="max_throughput")
    assert (hop.peer_id, hop.blocks) == (other.peer_id, BlockSpan(2, 4))
    manager.on_request_failure(one.peer_id)
    manager.on_request_success(one.peer_id)


def test_whole_sequences(manager: RemoteSequenceManager) -> None:
    rows = torch.cat([states(3, seed=1), states(2, seed=2)])
    wanted = torch.cat([expected(row, ALL) for row in torch.split(rows, [3, 2])])
    output = run_whole(manager.access, ALL, rows, PassCall((3, 2), taps=(1,)))
    torch.testing.assert_close(output.hidden, wanted)
    first = torch.cat([expected(row, BlockSpan(0, 2)) for row in torch.split(rows, [3, 2])])
    torch.testing.assert_close(output.tapped[1], first)
    wide = torch.zeros(2, 1, 1, HIDDEN + 1)
    for wrong, call in (
        (rows, PassCall((3, 3))),
        (rows.long(), PassCall((3, 2))),
        (rows, PassCall((3, 2), taps=(4,))),
        (rows, PassCall((3, 2), prompts=wide)),
        (rows, PassCall((3, 2), prompts=wide[..., :-1] * torch.nan)),
    ):
        with pytest.raises(BadInput):
            run_whole(manager.access, ALL, wrong, call)


def test_whole_sequences_are_differentiable(manager: RemoteSequenceManager) -> None:
    call = PassCall((3, 2), torch.zeros(4, 1, 2, HIDDEN), ToyAdapter.random((1, 2)), (1,))
    call.prompts.requires_grad_()
    rows = states(5).requires_grad_()
    inputs = [rows, call.prompts, *call.adapter.tensors]
    output = run_whole(manager.access, ALL, rows, call)
    loss = output.hidden.square().sum() + output.tapped[1].sum()
    made = run_call(rows, ALL, call)
    wanted = torch.autograd.grad(made[3].square().sum() + made[1].sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), wanted)
    with pytest.raises(BadInput, match="gradient"):
        torch.autograd.grad(loss * torch.nan, inputs, retain_graph=True)
    with torch.no_grad():
        rows.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


def test_only_prompts_are_trained(manager: RemoteSequenceManager) -> None:
    rows, prompts = states(5), torch.zeros(4, 2, 2, HIDDEN, requires_grad=True)
    call = PassCall((3, 2), prompts)
    run_whole(manager.access, ALL, rows, call).hidden.square().sum().backward()
    (wanted,) = torch.autograd.grad(run_call(rows, ALL, call)[3].square().sum(), [prompts])
    torch.testing.assert_close(prompts.grad, wanted)


def test_nothing_runs_through_no_blocks(manager: RemoteSequenceManager) -> None:
    rows = states(5).requires_grad_()
    output = run_whole(manager.access, BlockSpan(2, 2), rows, PassCall((3, 2)))
    assert output.hidden is rows


def test_sessions_in_many_threads(manager: RemoteSequenceManager) -> None:
    def one(seed: int) -> None:
        text = batch(seed, tokens=6)
        with InferenceSession(manager, max_length=10) as session:
            parts = [session.step(text[:, at : at + 1]) for at in range(6)]
        torch.testing.assert_close(torch.cat(parts, 1), whole(text))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(12)))


def test_shutdown_ends_sessions(swarm: ToySwarm, manager: RemoteSequenceManager) -> None:
    session = InferenceSession(manager, max_length=10)
    session.step(batch(1))
    manager[1:].shutdown()
    assert manager.is_alive
    manager.shutdown()
    assert not manager.is_alive
    assert client_loop.run(swarm.at_rest())
    with pytest.raises(SwarmError):
        InferenceSession(manager, max_length=10).step(batch(1))


def test_forgotten_managers_let_go_of_the_swarm(swarm: ToySwarm) -> None:
    manager = RemoteSequenceManager(config(), ["toy.0", "toy.1"], node=swarm.client)
    part = manager[1:]
    access = manager.access
    session = InferenceSession(part, max_length=10)
    session.step(batch(1))
    del manager
    gc.collect()
    assert access.is_alive
    session.step(batch(1))
    del part, session
    gc.collect()
    server = swarm.servers[0]
    client_loop.run(server.until(lambda: not server.sessions))
    assert not access.is_alive


def test_names(swarm: ToySwarm) -> None:
    with pytest.raises(ConfigError, match="no name"):
        RemoteSequenceManager(config(), BlockSpan(0, 4), node=swarm.client)
    for wrong in ([], ["toy.0", "toy.2"], ["toy.a"], ["toy.0", "other.1"]):
        with pytest.raises(ConfigError):
            RemoteSequenceManager(config(), wrong, node=swarm.client)
    other = RemoteSequenceManager(config(dht_prefix="x"), ["toy.0"], node=swarm.client)
    with pytest.raises(MissingBlocksError, match="of x"):
        other.make_sequence()
    other.shutdown()


def test_no_swarm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_INITIAL_PEERS", raising=False)
    with pytest.raises(ConfigError, match="No swarm is named") as caught:
        RemoteSequenceManager(config(), ["toy.0"]).make_sequence()
    assert "initial_peers" in caught.value.hint
