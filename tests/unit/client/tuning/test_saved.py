"""What was trained is saved without the model; loading continues it, and peft can read it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from petals.client.model.auto import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from petals.errors import ConfigError, ModelFilesBroken
from petals.models.adapters.config import LoraConfig
from support.local_blocks import run_here
from support.reference import assert_close

pytestmark = pytest.mark.slow

PEERS = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([2, 0])
FAMILIES = ("llama", "bloom", "opt", "gemma3_text")
CAUSAL, CLASSIFIER = AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
PTUNE = {"tuning_mode": "ptune", "pre_seq_len": 2}
CLOSE = 1e-4
"""Largest error, as a share of the largest value: peft adds in another order than Petals."""


@pytest.fixture(params=FAMILIES)
def folder(request, tiny_folder):
    return tiny_folder(request.param)


def load(kind, source, base, **options):
    """A model with remote blocks, which run in this process."""
    return run_here(kind.from_pretrained(str(source), initial_peers=PEERS, **options), base)


@pytest.fixture
def tuned(llama):
    return load(CAUSAL, llama, llama, **PTUNE)


def train(model, labels, num_steps=2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(IDS, labels=labels).loss.backward()
        optimizer.step()
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def assert_same_logits(model, other, skip=0):
    """``skip``: number of prompts for which ``other`` gives logits, too."""
    expected = other(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert_close(model(IDS).logits, expected[:, skip:] if skip else expected, CLOSE)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize(("kind", "labels"), [(CAUSAL, IDS), (CLASSIFIER, LABELS)])
def test_training_continues_with_the_same_loss(folder, tmp_path, mode, kind, labels):
    options = {"num_labels": 3} if kind is CLASSIFIER else {}
    model = load(kind, folder, folder, tuning_mode=mode, pre_seq_len=3, **options)
    train(model, labels).save_pretrained(tmp_path)
    again = load(kind, tmp_path, folder)
    assert again.num_prompt_tokens == 3
    with torch.no_grad():
        assert torch.equal(again(IDS, labels=labels).loss, model(IDS, labels=labels).loss)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == trained_names(model) == trained_names(again)
    train(again, labels)


def test_nothing_of_this_machine_is_saved(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "initial_peers" not in text and "12D3Koo" not in text
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.tuning_mode, config.pre_seq_len) == ("llama", "ptune", 2)
    assert config.architectures == ["LlamaForCausalLM"]


def test_peft_reads_prompts(folder, tmp_path):
    model = load(CAUSAL, folder, folder, **PTUNE)
    train(model, IDS).save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path))
    assert_same_logits(model, stock, skip=2)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_peft_reads_a_classifier_with_prompts(family, tiny_folder, tmp_path):
    base = tiny_folder(family)
    model = load(CLASSIFIER, base, base, num_labels=3, **PTUNE)
    train(model, LABELS).save_pretrained(tmp_path)
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert_same_logits(model, PeftModel.from_pretrained(whole, str(tmp_path)))


def test_transformers_reads_a_head(llama, tmp_path):
    model = load(CLASSIFIER, llama, llama, num_labels=3)
    train(model, LABELS).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    stock = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3).eval()
    stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_same_logits(model, stock)


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_a_lora_is_continued_and_peft_reads_it(llama, tmp_path, mode):
    model = load(CAUSAL, llama, llama, tuning_mode=mode, pre_seq_len=2)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    train(model, IDS).save_pretrained(tmp_path)
    again = load(CAUSAL, tmp_path, llama)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert trained_names(again) == trained_names(model)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path))
    if mode is None:
        assert_same_logits(model, stock)


def test_deep_prompts_are_no_adapter_of_peft(llama, tmp_path):
    load(CAUSAL, llama, llama, tuning_mode="deep_ptune", pre_seq_len=2).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_labels_and_padding_come_back(llama, tmp_path):
    names = {0: "bad", 1: "good", 2: "none"}
    numbers = {name: number for number, name in names.items()}
    model = load(CLASSIFIER, llama, llama, id2label=names, label2id=numbers)
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    config = load(CLASSIFIER, tmp_path, llama).config
    assert (config.id2label, config.num_labels, config.pad_token_id) == (names, 3, 5)


def test_the_config_shows_what_is_tuned(llama):
    config = AutoDistributedConfig.from_pretrained(llama, **PTUNE)
    assert (config.tuning_mode, config.pre_seq_len) == ("ptune", 2)
    assert CAUSAL.from_pretrained(llama, config=config).num_prompt_tokens == 2
    assert CAUSAL.from_pretrained(llama).config.tuning_mode is None


def test_the_base_is_loaded_from_the_same_files(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base / "inner")
    whole = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        whole.lm_head.weight.mul_(2)
    whole.save_pretrained(base / "inner", variant="twice")
    options = {"subfolder": "inner", "variant": "twice"}
    model = load(CAUSAL, base, base / "inner", **options, **PTUNE)
    model.save_pretrained(tmp_path / "tuned")
    again = load(CAUSAL, tmp_path / "tuned", base / "inner")
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight)
    assert again.base_access == model.base_access
    other = load(CAUSAL, tmp_path / "tuned", base / "inner", variant=None)
    assert torch.equal(other.lm_head.weight * 2, whole.lm_head.weight)


def test_unfrozen_parameters_replace_what_was_saved_before(llama, tmp_path):
    load(CAUSAL, llama, llama, **PTUNE).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    model = load(CAUSAL, tmp_path, llama)
    model.model.norm.requires_grad_()
    train(model, IDS).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = load(CAUSAL, tmp_path, llama)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert again.model.norm.weight.requires_grad


def test_nothing_to_save(llama, tmp_path):
    with pytest.raises(ConfigError, match="nothing to save") as refusal:
        load(CAUSAL, llama, llama).save_pretrained(tmp_path / "new")
    assert "tuning_mode" in refusal.value.hint
    assert not (tmp_path / "new").exists()


def test_uploads_are_refused(tuned, tmp_path):
    with pytest.raises(ConfigError, match="upload"):
        tuned.save_pretrained(tmp_path, push_to_hub=True)


def test_a_folder_of_another_class_is_refused(llama, tmp_path):
    load(CLASSIFIER, llama, llama, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ModelFilesBroken, match=r"score\.weight") as refusal:
        CAUSAL.from_pretrained(str(tmp_path))
    assert "LlamaForSequenceClassification" in refusal.value.hint


def rewrite_note(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"petals_tuned": [1]}))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), {}, "cannot be read"),
        (
            lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
            *({}, "no such parameter"),
        ),
        (rewrite_note, {}, "petals_tuned"),
        # Options overrule what was saved: there are more prompts than in the file.
        (lambda folder: None, {"pre_seq_len": 4}, "prompt_embeddings"),
    ],
    ids=["missing", "cut", "other tensors", "other note", "other prompts"],
)
def test_files_that_do_not_fit_are_refused(tuned, tmp_path, damage, options, message):
    tuned.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelFilesBroken, match=message):
        CAUSAL.from_pretrained(str(tmp_path), **options)
