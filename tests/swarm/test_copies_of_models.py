"""Copies and pickles of models and of their caches, in a swarm of real servers."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.reference import assert_close
from support.swarm import RealSwarm, real_swarm

IDS = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])


def by_pickle(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS = [copy.deepcopy, by_pickle, by_torch]


@pytest.fixture(scope="module", params=["llama", "bloom"])
def swarm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealSwarm]:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    with real_swarm(folder, BlockSpan(0, 2), BlockSpan(2, 5), cache_tokens=1024) as swarm:
        yield swarm


def answers(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("copied", COPIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_used_model(
    swarm: RealSwarm, copied: Callable[[PreTrainedModel], PreTrainedModel], dtype: torch.dtype
) -> None:
    model = swarm.model(dtype=dtype)
    expected = answers(model)
    twin = copied(model)
    assert type(twin) is type(model)
    assert twin.dtype is dtype
    is_shared = twin.remote_blocks.sequence_manager is model.remote_blocks.sequence_manager
    assert is_shared == (copied is copy.deepcopy)
    assert torch.equal(answers(twin), expected)
    part = twin.remote_blocks[2:4]
    assert copied(part).blocks == part.blocks
    if not is_shared:
        twin.remote_blocks.sequence_manager.shutdown()
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("copied", COPIERS)
def test_what_was_trained_is_in_the_copy_and_is_its_own(
    swarm: RealSwarm, copied: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.requires_grad_(False)
    expected = model(IDS).logits
    twin = copied(model)
    assert_close(twin(IDS).logits, expected)
    twin.transformer.prompt_embeddings.weight.add_(1.0)
    assert_close(model(IDS).logits, expected)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (twin.get_input_embeddings().weight is twin.get_output_embeddings().weight) == tied
    if copied is not copy.deepcopy:
        twin.remote_blocks.sequence_manager.shutdown()


def test_an_averaged_model(swarm: RealSwarm) -> None:
    model = swarm.model()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert_close(averaged(IDS).logits, swarm.local(IDS).logits)


def test_a_prefix_is_copied_on_the_servers(swarm: RealSwarm) -> None:
    model = swarm.model()
    with torch.no_grad():
        prefix = model(IDS, use_cache=True).past_key_values
        questions = [torch.tensor([[8, 41]]), torch.tensor([[9, 12, 4]])]
        for question in questions:
            ids = torch.cat([IDS, question], dim=1)
            own = copy.deepcopy(prefix)
            expected = swarm.local.generate(ids, max_new_tokens=5, use_cache=True)
            found = model.generate(ids, past_key_values=own, max_new_tokens=5)
            assert torch.equal(found, expected)
            first = own.open().trace.hops[0].steps[0]
            assert first.num_tokens == question.shape[1], "the prefix ran again"
        out = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
        loaded = pickle.loads(pickle.dumps(out))
        again = torch.cat([loaded.sequences, questions[0]], dim=1)
        found = model.generate(again, past_key_values=loaded.past_key_values, max_new_tokens=4)
        assert torch.equal(found, swarm.local.generate(again, max_new_tokens=4, use_cache=True))


def _shapes(model: PreTrainedModel, queue: "multiprocessing.Queue[object]") -> None:
    queue.put((type(model).__name__, model.get_input_embeddings()(IDS).shape))


def test_a_process_that_is_spawned_takes_the_model(swarm: RealSwarm) -> None:
    model = swarm.model()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_shapes, args=(model, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(60)
    assert found == (type(model).__name__, model.get_input_embeddings()(IDS).shape)
