"""The synchronous side: managers and sessions as scripts use them, from any thread."""

import gc
from collections.abc import Callable, Iterator
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
from support.clients import config
from support.models import WIDTH, random_adapter
from support.reference import assert_close, states
from support.service import Served, split
from support.talk import MODEL

ALL = BlockSpan(0, 4)
Whole = Callable[..., torch.Tensor]


@pytest.fixture
def swarm() -> Iterator[Served]:
    stack = AsyncExitStack()
    try:
        yield client_loop.run(stack.enter_async_context(split((0, 2), (2, 4), num_blocks=4)))
    finally:
        client_loop.run(stack.aclose())


@pytest.fixture
def manager(swarm: Served) -> Iterator[RemoteSequenceManager]:
    uids = [f"{MODEL}.{block}" for block in range(4)]
    with RemoteSequenceManager(config(), uids, node=swarm.client) as manager:
        yield manager


def batch(*seeds: int, tokens: int = 3) -> torch.Tensor:
    return torch.stack([states(tokens, seed=seed) for seed in seeds])


@pytest.fixture
def whole(swarm: Served) -> Whole:
    """``whole(inputs, blocks=ALL)``: what the model makes of rows [n, T, H]."""

    def run(inputs: torch.Tensor, blocks: BlockSpan = ALL) -> torch.Tensor:
        return torch.stack([swarm.expected(row, blocks) for row in inputs])

    return run


@pytest.fixture
def session(manager: RemoteSequenceManager) -> Iterator[InferenceSession]:
    with InferenceSession(manager, max_length=10) as session:
        yield session


def test_step_roll_back_and_go_on(session: InferenceSession, whole: Whole) -> None:
    text, other = batch(1, 2, tokens=8), batch(7, 8, tokens=2)
    assert (session.position, session.num_rows, session.num_blocks) == (0, None, 4)
    first = session.step(text[:, :5])
    rest = session.step(text[:, 5:])
    assert_close(torch.cat([first, rest], 1), whole(text))
    assert (session.position, session.num_rows, session.max_length) == (8, 2, 10)
    session.position = 4
    output = session.step(other)
    assert_close(output, whole(torch.cat([text[:, :4], other], 1))[:, 4:])
    with pytest.raises(SessionGap):
        session.position = 7
    with pytest.raises(LengthExceeded):
        session.step(batch(1, 2, tokens=5))


@pytest.mark.parametrize("order", [[2, 2, 0], [0, 1, 2, 2]], ids=["change places", "grow"])
def test_hypotheses(session: InferenceSession, whole: Whole, order: list[int]) -> None:
    text, new = batch(1, 2, 3), batch(*range(4, 4 + len(order)), tokens=1)
    session.step(text)
    output = session.step(new, hypo_ids=torch.tensor(order))
    assert_close(output, whole(torch.cat([text[order], new], 1))[:, 3:])
    with pytest.raises(BadInput):
        session.step(new, hypo_ids=torch.tensor([*order[:-1], len(order)]))


def test_zero_tokens(session: InferenceSession, whole: Whole) -> None:
    assert session.step(torch.empty(2, 0, WIDTH)).shape == (2, 0, WIDTH)
    assert session.num_rows == 2
    assert_close(session.step(batch(1, 2)), whole(batch(1, 2)))


def test_wrong_input(manager: RemoteSequenceManager) -> None:
    with InferenceSession(manager, max_length=10) as session:
        with pytest.raises(NotSupported):
            session.step(batch(1), prompts=torch.ones(4, 1, 2, WIDTH))
        with pytest.raises(BadInput, match=r"inputs\[None\]"):
            session.step(states(3))
        with pytest.raises(BadInput):
            session.last_token_id = torch.tensor([[1]])
    with pytest.raises(SessionClosed):
        session.step(batch(1))
    with pytest.raises(BadInput):
        InferenceSession(manager, max_length=0)


def test_output_ids_are_kept(session: InferenceSession) -> None:
    assert session.last_token_id is None
    session.output_ids = torch.tensor([[3, 4]])
    session.last_token_id = torch.tensor([[9]])
    assert session.output_ids.tolist() == [[3, 9]]


def test_gradients_do_not_follow_into_a_session(session: InferenceSession) -> None:
    assert not session.step(batch(1).requires_grad_()).requires_grad


def test_slices_are_paths_of_their_own(manager: RemoteSequenceManager, whole: Whole) -> None:
    part = manager[1:3]
    assert (len(part), part[1].blocks) == (2, BlockSpan(2, 3))
    assert part.block_uids == (f"{MODEL}.1", f"{MODEL}.2")
    assert [one.blocks.start for one in manager] == [0, 1, 2, 3]
    assert manager[-1].blocks == BlockSpan(3, 4)
    for path in (part, manager[:1]):
        with InferenceSession(path, max_length=10) as session:
            assert_close(session.step(batch(1)), whole(batch(1), path.blocks))
    with pytest.raises(ConfigError):
        manager[::2]
    with pytest.raises(IndexError):
        manager[4]


def test_routes_can_be_looked_at(swarm: Served, manager: RemoteSequenceManager) -> None:
    manager.update()
    one, other = swarm.workers
    assert [hop.peer_id for hop in manager.make_sequence()] == [one.peer_id, other.peer_id]
    (hop,) = manager[1:].make_sequence(1, mode="max_throughput")
    assert (hop.peer_id, hop.start, hop.end, hop.length) == (other.peer_id, 1, 3, 2)
    manager.on_request_failure(one.peer_id)
    manager.on_request_success(one.peer_id)


WIDE = torch.zeros(2, 1, 1, WIDTH + 1)


@pytest.mark.parametrize(
    ("rows", "call"),
    [
        (states(5), PassCall((3, 3))),
        (states(5).long(), PassCall((3, 2))),
        (states(5), PassCall((3, 2), taps=(4,))),
        (states(5), PassCall((3, 2), prompts=WIDE)),
        (states(5), PassCall((3, 2), prompts=WIDE[..., :-1] * torch.nan)),
    ],
)
def test_whole_sequences_that_cannot_be(
    manager: RemoteSequenceManager, rows: torch.Tensor, call: PassCall
) -> None:
    with pytest.raises(BadInput):
        run_whole(manager.access, ALL, rows, call)


def test_whole_sequences_are_differentiable(manager: RemoteSequenceManager, swarm: Served) -> None:
    adapter = random_adapter((1, 2)).leaves(ALL)
    call = PassCall((3, 2), torch.zeros(4, 1, 2, WIDTH), adapter, (1,))
    call.prompts.requires_grad_()
    rows = states(5).requires_grad_()
    inputs = [rows, call.prompts, *call.adapter.tensors]
    output = run_whole(manager.access, ALL, rows, call)
    made = swarm.traced(rows, call)
    assert_close([output.hidden, output.tapped[1]], [made[3], made[1]])
    loss = output.hidden.square().sum() + output.tapped[1].sum()
    wanted = torch.autograd.grad(made[3].square().sum() + made[1].sum(), inputs)
    for _ in range(2):
        assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), wanted, 1e-4)
    with torch.no_grad():
        rows.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)


def test_only_prompts_are_trained(manager: RemoteSequenceManager, swarm: Served) -> None:
    rows, prompts = states(5), torch.zeros(4, 2, 2, WIDTH, requires_grad=True)
    call = PassCall((3, 2), prompts)
    run_whole(manager.access, ALL, rows, call).hidden.square().sum().backward()
    (wanted,) = torch.autograd.grad(swarm.traced(rows, call)[3].square().sum(), [prompts])
    assert_close(prompts.grad, wanted, 1e-4)


def test_nothing_runs_through_no_blocks(manager: RemoteSequenceManager) -> None:
    rows = states(5).requires_grad_()
    output = run_whole(manager.access, BlockSpan(2, 2), rows, PassCall((3, 2)))
    assert output.hidden is rows


def test_sessions_in_many_threads(manager: RemoteSequenceManager, whole: Whole) -> None:
    def one(text: torch.Tensor) -> torch.Tensor:
        with InferenceSession(manager, max_length=10) as session:
            parts = [session.step(text[:, at : at + 1]) for at in range(6)]
        return torch.cat(parts, 1)

    texts = [batch(seed, tokens=6) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(one, texts))
    assert_close(outputs, [whole(text) for text in texts])


def test_shutdown_ends_sessions(swarm: Served, manager: RemoteSequenceManager) -> None:
    session = InferenceSession(manager, max_length=10)
    session.step(batch(1))
    manager[1:].shutdown()
    assert manager.is_alive()
    manager.shutdown()
    assert not manager.is_alive()
    client_loop.run(swarm.at_rest())
    with pytest.raises(SwarmError):
        InferenceSession(manager, max_length=10).step(batch(1))


def test_what_is_forgotten_is_closed(swarm: Served) -> None:
    manager = RemoteSequenceManager(config(), [f"{MODEL}.0", f"{MODEL}.1"], node=swarm.client)
    part, access = manager[1:], manager.access
    session, other = (InferenceSession(part, max_length=10) for _ in range(2))
    for each in (session, other):
        each.step(batch(1))
    (server, _) = swarm.workers
    del other, each
    gc.collect()
    client_loop.run(server.until(lambda: len(server.service.sessions) == 1))
    del manager
    gc.collect()
    assert access.is_alive
    session.step(batch(1))
    del part, session
    gc.collect()
    client_loop.run(server.at_rest())
    assert not access.is_alive


def test_names(swarm: Served) -> None:
    with pytest.raises(ConfigError, match="no name"):
        RemoteSequenceManager(config(), BlockSpan(0, 4), node=swarm.client)
    for wrong in ([], [f"{MODEL}.0", f"{MODEL}.2"], [f"{MODEL}.a"], [f"{MODEL}.0", "other.1"]):
        with pytest.raises(ConfigError):
            RemoteSequenceManager(config(), wrong, node=swarm.client)
    other = RemoteSequenceManager(config(dht_prefix="x"), [f"{MODEL}.0"], node=swarm.client)
    with pytest.raises(MissingBlocksError, match="of x"):
        other.make_sequence()
    other.shutdown()


def test_no_swarm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALS_INITIAL_PEERS", raising=False)
    with pytest.raises(ConfigError, match="No swarm is named") as caught:
        RemoteSequenceManager(config(), [f"{MODEL}.0"]).make_sequence()
    assert "initial_peers" in caught.value.hint
