"""Adapters of several users on the same servers, over a network in memory, against stock peft."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals import AutoDistributedModelForCausalLM, LoraConfig
from petals.client.connection.event_loop import client_loop
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import UnknownAdapter
from petals.swarm.config import NodeConfig
from petals.swarm.node import SwarmNode
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan, PeerId
from support.fake_server import config
from support.peft_adapters import save_adapter
from support.swarm import ALL, RealSwarm, real_swarm

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
PROMPT = IDS[:1, :7]
SETTINGS = {"min_backoff": 0.01, "repair_timeout": 60.0, "silence_timeout": 30.0}
"""A killed server is noticed at once; one that is slow because the machine is busy is kept."""


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def poems(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(folder, tmp_path_factory.mktemp("adapters") / "poems", seed=9)


@dataclass
class Users:
    """A swarm of the model in ``folder``, and the clients that a test makes."""

    folder: Path
    swarm: RealSwarm
    stack: ExitStack = field(default_factory=ExitStack)

    def model(self, **options: object) -> PreTrainedModel:
        """The model of a new user: a peer of its own."""
        network = NodeConfig(initial_peers=self.swarm.base.network.initial_peers, client_mode=True)
        node = SwarmNode(network, engine=self.swarm.net.engine)
        client_loop.run(node.__aenter__())
        self.stack.callback(lambda: client_loop.run(node.__aexit__(None, None, None)))
        settings = config(**({"dht_prefix": self.swarm.model} | SETTINGS | options))
        manager = self.stack.enter_context(RemoteSequenceManager(settings, ALL, node=node))
        model = AutoDistributedModelForCausalLM.from_pretrained(str(self.folder))
        model.remote_blocks.sequence_manager = manager
        return model

    def kill(self, peer: PeerId) -> None:
        client_loop.run(_soon(partial(self.swarm.net.kill, peer)))

    def local(self, adapter: Path | None = None, **options: object) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter), **options).eval()
        return model


async def _soon(work) -> None:
    work()


def users_of(folder: Path, *spans: BlockSpan, **options: object) -> Iterator[Users]:
    stack = AsyncExitStack()
    try:
        swarm = client_loop.run(
            stack.enter_async_context(real_swarm(folder, *spans, max_step_tokens=256, **options))
        )
        users = Users(folder, swarm)
        with users.stack:
            yield users
    finally:
        client_loop.run(stack.aclose())


@pytest.fixture
def users(folder: Path, poems: Path) -> Iterator[Users]:
    yield from users_of(folder, BlockSpan(0, 3), BlockSpan(3, 5), adapters=(str(poems),))


@pytest.fixture
def spares(folder: Path) -> Iterator[Users]:
    """Every block is served twice, so that one server can be killed."""
    spans = (BlockSpan(0, 3), BlockSpan(3, 5))
    yield from users_of(folder, *spans, *spans)


def begin(model: PreTrainedModel, seed: int, **settings: object) -> PreTrainedModel:
    model.add_adapter(LoraConfig(**settings))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.remote_blocks.lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


def train(model: PreTrainedModel, num_steps: int, ids: torch.Tensor) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_two_train_while_a_third_chats(users: Users, tmp_path: Path) -> None:
    settings = (
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 5, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    )
    texts = IDS, IDS.flip(1)
    trainees = [begin(users.model(), number, **kind) for number, kind in enumerate(settings)]
    for number, model in enumerate(trainees):
        model.save_adapter(tmp_path / f"before-{number}")
    chatter = users.model()
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(train, model, 6, ids) for model, ids in zip(trainees, texts)]
        said = [threads.submit(chatter.generate, PROMPT, max_new_tokens=16) for _ in range(3)]
        courses = [work.result() for work in running]
        words = [work.result() for work in said]
    for number, (model, ids, course) in enumerate(zip(trainees, texts, courses)):
        alone = users.local(tmp_path / f"before-{number}", is_trainable=True)
        assert course == pytest.approx(train(alone, 6, ids), rel=1e-5)
        model.save_adapter(tmp_path / f"after-{number}")
        with torch.no_grad():
            expected = users.local(tmp_path / f"after-{number}")(input_ids=PROMPT).logits
            assert_close(model(PROMPT).logits, expected)
            assert_close(expected, alone(input_ids=PROMPT).logits)
    expected = users.local().generate(PROMPT, max_new_tokens=16)
    for answer in words:
        assert torch.equal(answer, expected)


def test_a_preloaded_adapter_is_asked_for_by_name(users: Users, poems: Path) -> None:
    model = users.model(active_adapter="poems")
    expected = users.local(poems).generate(input_ids=PROMPT, max_new_tokens=8)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8), expected)
    assert not torch.equal(users.model().generate(PROMPT, max_new_tokens=8), expected)
    with torch.no_grad():
        assert_close(model(IDS).logits, users.local(poems)(input_ids=IDS).logits)
    with pytest.raises(UnknownAdapter, match="prose"):
        users.model(active_adapter="prose").generate(PROMPT, max_new_tokens=8)


@pytest.mark.parametrize("is_ring", [True, False], ids=["ring", "star"])
def test_a_session_keeps_its_adapter_when_a_server_dies(
    spares: Users, poems: Path, is_ring: bool
) -> None:
    model = spares.model(use_server_to_server=is_ring)
    model.load_adapter(poems)
    whole = spares.local(poems).generate(input_ids=PROMPT, max_new_tokens=12)
    with model.inference_session(max_length=32) as session:
        model.generate(PROMPT, max_new_tokens=4)
        victims = []
        for index in (1, 0):
            victims.append(session.trace.hops[index].peer_id)
            spares.kill(victims[-1])
            found = model.generate(None, max_new_tokens=4)
        assert set(victims) <= {repair.peer_id for repair in session.trace.repairs}
    assert torch.equal(found, whole[:, -found.shape[1] :])


@pytest.mark.parametrize("index", [0, 1])
def test_a_death_before_the_way_back_changes_no_gradient(
    spares: Users, poems: Path, index: int
) -> None:
    model = spares.model()
    model.load_adapter(poems, is_trainable=True)
    expected = spares.local(poems, is_trainable=True)
    expected(input_ids=IDS, labels=IDS).loss.backward()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    used = {leg.hop.peer_id for leg in legs_of(loss)}
    mine = [spares.swarm.peers[index], spares.swarm.peers[index + 2]]
    spares.kill(next(peer for peer in mine if peer in used))
    loss.backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in model.remote_blocks.lora.named_parameters():
        path = f"base_model.model.model.layers.{name}.default.weight"
        assert_close(parameter.grad, theirs[path].grad)


def legs_of(loss: torch.Tensor):
    """The hops of the pass that a loss was computed through."""
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if hasattr(node, "here"):
            return [leg for batch in node.here._pass._batches for leg in batch._legs]
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError("no pass")
