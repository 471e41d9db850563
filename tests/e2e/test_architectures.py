"""Mixtral, in its published naming, through real processes with overlapping spans.

The chaos tests do the same with BLOOM.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import PUBLISHED, write_tiny_model
from petals.types import BlockSpan


def test_tokens_equal_the_local_model(tmp_path: Path) -> None:
    source = write_tiny_model(
        tmp_path / "mixtral", "mixtral", layout=PUBLISHED["mixtral"], num_hidden_layers=5
    )
    local = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = LocalSwarmConfig(
        model=str(source),
        spans=(BlockSpan(0, 3), BlockSpan(1, 5)),
        dtype="float32",
        num_threads=1,
    )
    prompt = torch.randint(5, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with LocalSwarm(config) as swarm:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(source), initial_peers=list(swarm.initial_peers), dtype=torch.float32
        )
        for mode in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, **mode}
            expected = local.generate(prompt, **options)
            actual = model.generate(prompt, **options)
            assert_same_tokens(local, expected[0], actual[0])
