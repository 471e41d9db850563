"""Rope factors that depend on the length of a text: as one pass of stock transformers has them."""

import torch

from petals.types import BlockSpan
from support.reference import assert_close, token_ids
from support.swarm import real_swarm

LIMIT = 24
"""Tokens from which on the factors of the models below change."""

HALVES = (BlockSpan(0, 2), BlockSpan(2, 5))


def longrope(**more):
    return {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 1.5, 2.0, 4.0],
            "original_max_position_embeddings": LIMIT,
        },
    } | more


MODELS = {
    "phi3": longrope(original_max_position_embeddings=LIMIT),
    "llama": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
}
import pytest

from petals.testing.tiny_models import write_tiny_model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [20, 30, 60])
def test_prompt(name, length, tmp_path):
    folder = write_tiny_model(tmp_path, name, **MODELS[name])
    with real_swarm(folder, *HALVES, max_step_tokens=64) as swarm:
        remote, local = swarm.model(), swarm.local
        ids = token_ids(1, length)
        assert_close(
            remote(ids, use_cache=True, past_key_values=remote.new_cache()).logits,
            local(ids).logits,
        )
        assert_close(remote(ids).logits, swarm.local(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_generate(name, tmp_path):
    folder = write_tiny_model(tmp_path, name, **MODELS[name])
    with real_swarm(folder, *HALVES, max_step_tokens=64) as swarm:
        remote, local = swarm.model(), swarm.local
        ids = token_ids(1, 20)
        want = local.generate(ids, max_new_tokens=30)
        assert torch.equal(remote.generate(ids, max_new_tokens=30), want)
        with remote.inference_session(max_length=60):
            assert torch.equal(remote.generate(ids, max_new_tokens=30), want)
