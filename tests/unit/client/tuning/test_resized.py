"""New tokens: resize, train, save and load again, as transformers and peft do it."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    LoraConfig,
)
from petals.errors import AdapterRefused, ModelFilesBroken
from petals.testing.tiny_models import write_tiny_model
from support.local_blocks import run_here
from support.lora_trainee import train
from support.reference import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))
NUM_TOKENS = 99
"""Three more than the tiny models have."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("resized") / "llama"
    return write_tiny_model(target, "llama", tie_word_embeddings=request.param)


def load(source, base, **options):
    return run_here(AutoDistributedModelForCausalLM.from_pretrained(source, **options), base)


def pair(folder):
    """(local, remote), both resized, with the same new rows."""
    local = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    remote = load(folder, folder)
    for model in (local, remote):
        model.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    remote.get_input_embeddings().load_state_dict(local.get_input_embeddings().state_dict())
    remote.get_output_embeddings().load_state_dict(local.get_output_embeddings().state_dict())
    return local, remote


def same(model, expected):
    with torch.no_grad():
        assert_close(model(IDS).logits, expected(IDS).logits)
    actual = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(actual, expected.generate(input_ids=IDS, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("trained", [("embeddings",), ("head",), ("embeddings", "head")], ids=str)
def test_trained_embeddings_and_head_come_back(folder, tmp_path, trained):
    local, remote = pair(folder)
    same(remote, local)
    for model in (local, remote):
        for part in trained:
            getter = model.get_input_embeddings if part == "embeddings" else None
            (getter or model.get_output_embeddings)().requires_grad_()
    assert train(remote, IDS, 3) == pytest.approx(train(local, IDS, 3), rel=1e-4)
    remote.save_pretrained(tmp_path)
    again = load(tmp_path, folder)
    assert again.config.vocab_size == NUM_TOKENS
    same(again, local)
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (again, remote)]
    assert flags[0] == flags[1]
    again.save_pretrained(tmp_path / "once more")
    same(load(tmp_path / "once more", folder), local)


def test_rows_that_were_not_trained_are_saved_too(folder, tmp_path):
    local, remote = pair(folder)
    remote.save_pretrained(tmp_path)
    again = load(tmp_path, folder)
    same(again, local)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("modules", [[], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_of_a_resized_model(folder, tmp_path, modules):
    local, remote = pair(folder)
    remote.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
    train(remote, IDS, 3)
    remote.save_pretrained(tmp_path)
    same(load(tmp_path, folder), remote)
    under_peft = peft.PeftModel.from_pretrained(local, tmp_path).eval()
    same(remote, under_peft)


def test_an_adapter_that_peft_has_saved_of_a_resized_model(folder, tmp_path):
    local, remote = pair(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(local, config).eval()
    adapted.save_pretrained(tmp_path)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    remote.load_adapter(tmp_path)
    same(remote, adapted)
    with pytest.raises(AdapterRefused, match=r"\[99, 32\]") as refusal:
        load(folder, folder).load_adapter(tmp_path)
    assert "resize_token_embeddings" in refusal.value.hint


def test_prompts_of_a_resized_model(folder, tmp_path):
    remote = load(folder, folder, tuning_mode="deep_ptune", pre_seq_len=2)
    remote.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    train(remote, IDS, 2)
    remote.save_pretrained(tmp_path)
    same(load(tmp_path, folder), remote)


def test_a_classifier_of_a_resized_model(folder, tmp_path):
    kind = AutoDistributedModelForSequenceClassification
    remote = run_here(kind.from_pretrained(folder, num_labels=2, pad_token_id=0), folder)
    remote.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    remote.save_pretrained(tmp_path)
    again = run_here(kind.from_pretrained(tmp_path), folder)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0)
    stock.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)
    stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert_close(again(IDS).logits, remote(IDS).logits)
        assert_close(again(IDS).logits, stock.eval()(IDS).logits)
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained == ["score.weight"]


def test_a_damaged_note_is_refused(folder, tmp_path):
    load(folder, folder, tuning_mode="ptune", pre_seq_len=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["petals_tuned"]["tokens"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFilesBroken, match="petals_tuned"):
        load(tmp_path, folder)
