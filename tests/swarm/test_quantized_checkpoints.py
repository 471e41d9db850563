"""An fp8 checkpoint with generation settings in its config.json gives transformers' words."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from petals.testing.in_process_swarm import InProcessSwarm
from petals.types import BlockSpan
from support import quantized as formats

IDS = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(4))


def test_words_of_an_fp8_checkpoint_with_settings_in_its_config(tmp_path: Path) -> None:
    folder = formats.write_quantized(tmp_path, formats.FP8, formats.fp8_blocks)
    config = folder / "config.json"
    settings = {"repetition_penalty": 1.7, "num_beams": 3, "max_length": 24, "eos_token_id": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    (folder / "generation_config.json").unlink(missing_ok=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    expected = whole.generate(IDS)
    with InProcessSwarm(folder, BlockSpan(0, 2), BlockSpan(2, 5)) as swarm:
        found = swarm.model().generate(IDS)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] == 24
