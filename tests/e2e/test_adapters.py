"""Two users train adapters of their own while a third chats, all of them real processes."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalSwarm, LocalSwarmConfig
from petals.testing.tiny_models import write_tiny_model
from petals.types import BlockSpan
from support.lora_trainee import learn, train
from support.peft_adapters import save_adapter

IDS = torch.randint(5, 60, (4, 24), generator=torch.Generator().manual_seed(1))
PROMPT = IDS[:1, :9]
NUM_STEPS = 4


def test_users_do_not_notice_each_other(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "llama", "llama")
    poems = save_adapter(source, tmp_path / "poems", seed=7, r=3)
    mine = [
        save_adapter(source, tmp_path / "first", seed=1, r=2, target_modules=["q_proj"]),
        save_adapter(source, tmp_path / "second", seed=2, r=5, target_modules=["o_proj"]),
    ]
    before = [shutil.copytree(path, tmp_path / f"{path.name}-before") for path in mine]
    texts = IDS, IDS.flip(0, 1)
    config = LocalSwarmConfig(
        model=str(source),
        spans=(BlockSpan(0, 3), BlockSpan(1, 5)),
        dtype="float32",
        num_threads=1,
        server_options=("--adapters", str(poems)),
    )

    def local(adapter: Path, **options: object) -> peft.PeftModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, str(adapter), **options).eval()

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as users, LocalSwarm(config) as swarm:
        peers = list(swarm.initial_peers)
        chatter = AutoDistributedModelForCausalLM.from_pretrained(
            str(source), initial_peers=peers, dtype=torch.float32, active_adapter="poems"
        )
        courses = [
            users.submit(learn, source, peers, adapter, ids, NUM_STEPS)
            for adapter, ids in zip(mine, texts)
        ]
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1}
        answers = [chatter.generate(PROMPT, **options) for _ in range(4)]
        found = [course.result() for course in courses]
    expected = local(poems).generate(input_ids=PROMPT, **options)
    for answer in answers:
        assert_same_tokens(local(poems), expected[0], answer[0])
    for course, adapter, earlier, ids in zip(found, mine, before, texts):
        alone = local(earlier, is_trainable=True)
        assert course == pytest.approx(train(alone, ids, NUM_STEPS), rel=1e-5)
        with torch.no_grad():
            logits = local(adapter)(input_ids=PROMPT).logits
            difference = (logits - alone(input_ids=PROMPT).logits).abs().max()
        assert difference <= 1e-4 * logits.abs().max()
