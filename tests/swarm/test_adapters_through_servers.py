"""Adapters of servers and of users, over a network in memory, against stock peft."""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from petals.errors import UnknownAdapter
from petals.types import BlockSpan
from support.peft_adapters import save_adapter
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm

IDS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
PROMPT = IDS[:1, :7]
PATIENT = {"min_backoff": 0.01, "repair_timeout": 60.0, "silence_timeout": 30.0}
"""A killed server is noticed at once; one that is slow because the machine is busy is kept."""


@pytest.fixture(scope="module")
def poems(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(llama, tmp_path_factory.mktemp("adapters") / "poems", seed=9)


def adapted(llama: Path, adapter: Path, **options: object) -> peft.PeftModel:
    """The model in this process, with an adapter by peft itself."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    return peft.PeftModel.from_pretrained(model, str(adapter), **options).eval()


@pytest.fixture
def swarm(llama: Path, poems: Path) -> Iterator[RealSwarm]:
    """Every block is served twice, so that one server can be killed."""
    spans = (BlockSpan(0, 3), BlockSpan(3, 5))
    options = {"max_step_tokens": 256, "client": PATIENT}
    with real_swarm(llama, *spans, *spans, adapters=(str(poems),), **options) as swarm:
        yield swarm


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
    swarm: RealSwarm, llama: Path, poems: Path, is_ring: bool
) -> None:
    model = swarm.model(use_server_to_server=is_ring)
    model.load_adapter(poems)
    whole = adapted(llama, poems).generate(input_ids=PROMPT, max_new_tokens=12)
    with model.inference_session(max_length=32) as session:
        model.generate(PROMPT, max_new_tokens=4)
        victims = []
        for index in (1, 0):
            victims.append(session.trace.hops[index].peer_id)
            swarm.kill(victims[-1])
            found = model.generate(None, max_new_tokens=4)
        assert set(victims) <= {repair.peer_id for repair in session.trace.repairs}
    assert torch.equal(found, whole[:, -found.shape[1] :])
