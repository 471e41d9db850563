"""What was trained is saved without the model; loading continues it, and peft can read it."""

import json

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
from petals.models.checkpoint.arch import describe
from petals.testing.tiny_models import write_tiny_model
from support.local_blocks import LocalBlocks

pytestmark = pytest.mark.slow

PEERS = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([2, 0])
FAMILIES = ("llama", "bloom", "opt", "gemma3_text")
CAUSAL, CLASSIFIER = AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / request.param
    return str(write_tiny_model(path, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama"))


def load(kind, source, base, **options):
    """A model with remote blocks, which run in this process."""
    remote = kind.from_pretrained(str(source), initial_peers=PEERS, **options)
    local = AutoModelForCausalLM.from_pretrained(base)
    remote.remote_blocks.runner = LocalBlocks(local.base_model, describe(local.config))
    return remote


def train(model, labels, num_steps=2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(IDS, labels=labels).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize(("kind", "labels"), [(CAUSAL, IDS), (CLASSIFIER, LABELS)])
def test_goes_on_with_the_same_loss(folder, tmp_path, mode, kind, labels):
    options = {"num_labels": 3} if kind is CLASSIFIER else {}
    model = load(kind, folder, folder, tuning_mode=mode, pre_seq_len=3, **options)
    train(model, labels).save_pretrained(tmp_path / "tuned")
    again = load(kind, tmp_path / "tuned", folder)
    assert again.num_prompt_tokens == 3
    with torch.no_grad():
        assert torch.equal(again(IDS, labels=labels).loss, model(IDS, labels=labels).loss)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert set(load_file(tmp_path / "tuned" / "model.safetensors")) == trained
    train(again, labels)


def test_says_nothing_of_this_machine(llama, tmp_path):
    model = load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "initial_peers" not in text and "12D3Koo" not in text
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.tuning_mode, config.pre_seq_len) == ("llama", "ptune", 2)
    assert config.architectures == ["LlamaForCausalLM"]


def test_peft_reads_prompts(folder, tmp_path):
    model = load(CAUSAL, folder, folder, tuning_mode="ptune", pre_seq_len=3)
    train(model, IDS).save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path))
    with torch.no_grad():
        expected = stock(IDS).logits[:, 3:]
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_peft_reads_a_classifier_with_prompts(family, tmp_path):
    base = str(write_tiny_model(tmp_path / family, family))
    model = load(CLASSIFIER, base, base, tuning_mode="ptune", pre_seq_len=3, num_labels=3)
    train(model, LABELS).save_pretrained(tmp_path / "tuned")
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    stock = PeftModel.from_pretrained(whole, str(tmp_path / "tuned"))
    with torch.no_grad():
        expected = stock(IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_transformers_reads_a_head(llama, tmp_path):
    model = load(CLASSIFIER, llama, llama, num_labels=3)
    train(model, LABELS).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    stock = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3).eval()
    stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_a_lora_goes_on_and_peft_reads_it(llama, tmp_path, mode):
    options = {"tuning_mode": mode, "pre_seq_len": 2}
    model = load(CAUSAL, llama, llama, **options)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    train(model, IDS).save_pretrained(tmp_path / "tuned")
    again = load(CAUSAL, tmp_path / "tuned", llama)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    base = AutoModelForCausalLM.from_pretrained(llama)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "tuned"))
    if mode is None:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)


def test_deep_prompts_are_no_adapter_of_peft(llama, tmp_path):
    load(CAUSAL, llama, llama, tuning_mode="deep_ptune", pre_seq_len=2).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_labels_and_padding_come_back(llama, tmp_path):
    names = {0: "bad", 1: "good", 2: "none"}
    model = load(
        CLASSIFIER, llama, llama, id2label=names, label2id={v: k for k, v in names.items()}
    )
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    config = load(CLASSIFIER, tmp_path, llama).config
    assert (config.id2label, config.num_labels, config.pad_token_id) == (names, 3, 5)


def test_what_the_user_unfroze_is_saved(llama, tmp_path):
    model = load(CAUSAL, llama, llama)
    model.model.norm.requires_grad_()
    train(model, IDS).save_pretrained(tmp_path)
    again = load(CAUSAL, tmp_path, llama)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert again.model.norm.weight.requires_grad


def test_options_overrule_what_was_saved(llama, tmp_path):
    load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2).save_pretrained(tmp_path)
    with pytest.raises(ModelFilesBroken, match="prompt_embeddings"):
        CAUSAL.from_pretrained(str(tmp_path), pre_seq_len=4)


class TestRefusals:
    def test_nothing_to_save(self, llama, tmp_path):
        with pytest.raises(ConfigError, match="nothing to save") as refusal:
            load(CAUSAL, llama, llama).save_pretrained(tmp_path / "new")
        assert "tuning_mode" in refusal.value.hint
        assert not (tmp_path / "new").exists()

    def test_uploads(self, llama, tmp_path):
        model = load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2)
        with pytest.raises(ConfigError, match="upload"):
            model.save_pretrained(tmp_path, push_to_hub=True)

    def test_another_class(self, llama, tmp_path):
        load(CLASSIFIER, llama, llama, num_labels=2).save_pretrained(tmp_path)
        with pytest.raises(ModelFilesBroken, match=r"score\.weight") as refusal:
            CAUSAL.from_pretrained(str(tmp_path))
        assert "LlamaForSequenceClassification" in refusal.value.hint

    @pytest.mark.parametrize("damage", ["cut", "missing"])
    def test_damaged_files(self, llama, tmp_path, damage):
        load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2).save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.unlink() if damage == "missing" else weights.write_bytes(b"abc")
        with pytest.raises(ModelFilesBroken, match="cannot be read"):
            CAUSAL.from_pretrained(str(tmp_path))

    def test_a_note_of_somebody_else(self, llama, tmp_path):
        load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"petals_tuned": [1]}))
        with pytest.raises(ModelFilesBroken, match="petals_tuned"):
            CAUSAL.from_pretrained(str(tmp_path))


def test_the_config_shows_what_is_tuned(llama):
    config = AutoDistributedConfig.from_pretrained(llama, tuning_mode="ptune", pre_seq_len=6)
    assert (config.tuning_mode, config.pre_seq_len) == ("ptune", 6)
    model = CAUSAL.from_pretrained(llama, config=config)
    assert model.num_prompt_tokens == 6
    assert CAUSAL.from_pretrained(llama).config.tuning_mode is None


def test_files_are_written_whole(llama, tmp_path):
    """Saving twice leaves the second state, also if the first had more tensors."""
    model = load(CAUSAL, llama, llama, tuning_mode="ptune", pre_seq_len=2)
    model.save_pretrained(tmp_path)
    model.model.norm.requires_grad_()
    model.save_pretrained(tmp_path)
    assert "model.norm.weight" in load_file(tmp_path / "model.safetensors")
    assert not (tmp_path / "adapter_config.json").exists()
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFilesBroken, match="no such parameter"):
        CAUSAL.from_pretrained(str(tmp_path))
