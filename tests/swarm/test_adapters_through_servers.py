"""Adapters of several users on the same servers, over a network in memory, against stock peft."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals import LoraConfig
from petals.errors import UnknownAdapter
from petals.types import BlockSpan, PeerId
from support.lora_trainee import train
from support.peft_adapters import save_adapter
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
PROMPT = IDS[:1, :7]
LARGE = 8192
"""What is written at once and has more bytes carries the states of the pass."""

PATIENT = {"min_backoff": 0.01, "repair_timeout": 60.0, "silence_timeout": 30.0}
"""A killed server is noticed at once; one that is slow because the machine is busy is kept."""

ROOM = {"max_step_tokens": 256, "client": PATIENT}


@pytest.fixture(scope="module")
def poems(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(llama, tmp_path_factory.mktemp("adapters") / "poems", seed=9)


def adapted(llama: Path, adapter: Path, **options: object) -> peft.PeftModel:
    """The model in this process, with an adapter by peft itself."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    return peft.PeftModel.from_pretrained(model, str(adapter), **options).eval()


@pytest.fixture
def swarm(llama: Path, poems: Path) -> Iterator[RealSwarm]:
    spans = (BlockSpan(0, 3), BlockSpan(3, 5))
    with real_swarm(llama, *spans, adapters=(str(poems),), **ROOM) as swarm:
        yield swarm


@pytest.fixture
def spares(llama: Path) -> Iterator[RealSwarm]:
    """Every block is served twice, so that one server can be killed."""
    spans = (BlockSpan(0, 3), BlockSpan(3, 5))
    with real_swarm(llama, *spans, *spans, **ROOM) as swarm:
        yield swarm


def begin(model: PreTrainedModel, seed: int, **settings: object) -> PreTrainedModel:
    model.add_adapter(LoraConfig(**settings))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.remote_blocks.lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


@pytest.mark.slow
def test_two_train_while_a_third_chats(swarm: RealSwarm, llama: Path, tmp_path: Path) -> None:
    settings = (
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 5, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    )
    texts = IDS, IDS.flip(1)
    trainees = [begin(swarm.model(), number, **kind) for number, kind in enumerate(settings)]
    for number, model in enumerate(trainees):
        model.save_adapter(tmp_path / f"before-{number}")
    chatter = swarm.model()
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(train, model, ids, 6) for model, ids in zip(trainees, texts)]
        said = [threads.submit(chatter.generate, PROMPT, max_new_tokens=16) for _ in range(3)]
        courses = [work.result() for work in running]
        words = [work.result() for work in said]
    for number, (model, ids, course) in enumerate(zip(trainees, texts, courses)):
        alone = adapted(llama, tmp_path / f"before-{number}", is_trainable=True)
        assert course == pytest.approx(train(alone, ids, 6), rel=1e-5)
        model.save_adapter(tmp_path / f"after-{number}")
        with torch.no_grad():
            expected = adapted(llama, tmp_path / f"after-{number}")(input_ids=PROMPT).logits
            assert_close(model(PROMPT).logits, expected)
            assert_close(expected, alone(input_ids=PROMPT).logits)
    expected = swarm.local.generate(PROMPT, max_new_tokens=16)
    for answer in words:
        assert torch.equal(answer, expected)


def test_a_preloaded_adapter_is_asked_for_by_name(
    swarm: RealSwarm, llama: Path, poems: Path
) -> None:
    model = swarm.model(active_adapter="poems")
    expected = adapted(llama, poems).generate(input_ids=PROMPT, max_new_tokens=8)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8), expected)
    assert not torch.equal(swarm.model().generate(PROMPT, max_new_tokens=8), expected)
    with torch.no_grad():
        assert_close(model(IDS).logits, adapted(llama, poems)(input_ids=IDS).logits)
    with pytest.raises(UnknownAdapter, match="prose"):
        swarm.model(active_adapter="prose").generate(PROMPT, max_new_tokens=8)


@pytest.mark.parametrize("is_ring", [True, False], ids=["ring", "star"])
def test_a_session_keeps_its_adapter_when_a_server_dies(
    spares: RealSwarm, llama: Path, poems: Path, is_ring: bool
) -> None:
    model = spares.model(use_server_to_server=is_ring)
    model.load_adapter(poems)
    whole = adapted(llama, poems).generate(input_ids=PROMPT, max_new_tokens=12)
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
    spares: RealSwarm, llama: Path, poems: Path, index: int
) -> None:
    model = spares.model()
    model.load_adapter(poems, is_trainable=True)
    expected = adapted(llama, poems, is_trainable=True)
    expected(input_ids=IDS, labels=IDS).loss.backward()
    used: set[PeerId] = set()
    spares.net.on_write = lambda source, target, size: used.add(target) if size > LARGE else None
    loss = model(IDS, labels=IDS, use_cache=False).loss
    spares.kill(next(peer for peer in spares.peers[index::2] if peer in used))
    loss.backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in model.remote_blocks.lora.named_parameters():
        path = f"base_model.model.model.layers.{name}.default.weight"
        assert_close(parameter.grad, theirs[path].grad)
