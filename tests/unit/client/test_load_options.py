"""from_pretrained takes pasted calls: every argument of the installed transformers."""

import ast
import copy
import inspect
import json
import shutil
import textwrap
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from petals import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    DistributedLlamaForCausalLM,
)
from petals.client.load_options import FULFILLED, HONOURED, REFUSED, WITHOUT_EFFECT, device_of
from petals.errors import AdapterRefused, ConfigError, ModelFilesBroken, NotSupported
from support.local_blocks import run_here
from support.peft_adapters import save_adapter
from support.reference import assert_close

IDS = torch.tensor([[11, 54, 7, 33]])
CAUSAL, CLASSIFIER = AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
SETTINGS = {"experts_implementation", "model_type", "name_or_path", "num_labels"}
SETTINGS |= {"output_attentions"}
"""Fields of the config that transformers names among the arguments."""
ASKING = {
    "_configuration_file": "other.json",
    "adapter_kwargs": {"revision": "x"},
    "adapter_name": "mine",
    "device_mesh": object(),
    "distributed_config": object(),
    "key_mapping": {"^a": "b"},
    "quantization_config": {"load_in_4bit": True},
    "state_dict": {"x": torch.zeros(1)},
    "tp_plan": "auto",
    "tp_size": 2,
    "use_safetensors": False,
}
"""Values of refused arguments that ask for something; True for the others."""


def arguments_of(function):
    """The names that a function of transformers takes from its callers, by its source."""
    function = getattr(function, "__func__", function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = {arg.arg for arg in ast.walk(tree) if isinstance(arg, ast.arg)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="pop" | "get"),
                args=[ast.Constant(value=str(name)), *_],
            ) if "kwargs" in owner:
                found.add(name)
            case ast.Compare(
                left=ast.Constant(value=str(name)), comparators=[ast.Name(id=owner)]
            ) if "kwargs" in owner:
                found.add(name)
            case ast.List(elts=elements):
                texts = (e.value for e in elements if isinstance(e, ast.Constant))
                found |= {text for text in texts if isinstance(text, str)}
    return found - {"cls", "kwargs", "model_args", "config_dict"}


@pytest.mark.parametrize(
    "function",
    [
        PreTrainedModel.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoConfig.from_pretrained,
        PretrainedConfig.from_pretrained,
        PretrainedConfig.get_config_dict,
        PretrainedConfig._get_config_dict,
        PretrainedConfig.from_dict,
    ],
    ids=lambda function: function.__qualname__,
)
def test_every_argument_of_transformers_is_decided(function):
    names = arguments_of(function)
    assert {"token", "revision"} & names or "num_labels" in names
    assert not names - HONOURED - FULFILLED - WITHOUT_EFFECT.keys() - REFUSED.keys() - SETTINGS


def test_each_is_decided_once():
    groups = [HONOURED, FULFILLED, set(WITHOUT_EFFECT), set(REFUSED)]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_what_asks_for_nothing_is_taken_in_silence(llama):
    flags = dict.fromkeys(FULFILLED, True)
    nothing = dict.fromkeys(HONOURED | WITHOUT_EFFECT.keys() | REFUSED.keys())
    del nothing["pretrained_model_name_or_path"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CAUSAL.from_pretrained(llama, **nothing, **flags)
        no = dict.fromkeys({*WITHOUT_EFFECT, *REFUSED} - {"use_safetensors"}, False)
        CAUSAL.from_pretrained(llama, **no | {"adapter_name": "default"}, use_safetensors=True)
        empty = {"key_mapping": {}, "proxies": {}, "subfolder": "", "tp_plan": ""}
        CAUSAL.from_pretrained(llama, **empty, local_files_only=True)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_right_is_refused_with_the_reason(llama, name):
    for load in (CAUSAL.from_pretrained, DistributedLlamaForCausalLM.from_pretrained):
        with pytest.raises(NotSupported, match=f"{name}=...") as refusal:
            load(llama, **{name: ASKING.get(name, True)})
        assert refusal.value.hint


def test_what_has_no_effect_gives_one_warning(llama):
    with pytest.warns(UserWarning, match="from_pretrained") as found:
        CAUSAL.from_pretrained(llama, **dict.fromkeys(WITHOUT_EFFECT, "x"))
    (warning,) = [entry for entry in found if entry.category is UserWarning]
    assert all(name in str(warning.message) for name in WITHOUT_EFFECT)
    assert warning.filename == __file__


class TestDevices:
    @pytest.mark.parametrize(
        "device_map",
        ["cpu", torch.device("cpu"), {"": "cpu"}, {"model.embed_tokens": "cpu", "lm_head": "cpu"}],
        ids=str,
    )
    def test_of_the_ends(self, llama, device_map):
        assert CAUSAL.from_pretrained(llama, device_map=device_map).device.type == "cpu"

    @pytest.mark.parametrize(
        "device_map", ["auto", "balanced", "sequential", {"": "auto"}], ids=str
    )
    def test_chosen_here(self, device_map):
        accelerator = torch.accelerator.current_accelerator()
        assert device_of(device_map) == ("cpu" if accelerator is None else accelerator.type)

    @pytest.mark.parametrize("device_map", ["disk", "cuda:77", 77, {}, {"a": "cpu", "b": "meta"}])
    def test_that_are_not_here(self, llama, device_map):
        with pytest.raises(ConfigError, match="device") as refusal:
            CAUSAL.from_pretrained(llama, device_map=device_map)
        assert refusal.value.hint


def test_a_generation_config(llama):
    given = GenerationConfig(max_new_tokens=3, num_beams=2, use_cache=False)
    model = CAUSAL.from_pretrained(llama, generation_config=given)
    assert model.generation_config == given
    assert model.generation_config is not given
    assert AutoDistributedModel.from_pretrained(llama, generation_config=given)


def test_a_config_is_used_as_it_was_given(llama):
    config = AutoConfig.from_pretrained(llama, num_labels=4, pad_token_id=7)
    model = CLASSIFIER.from_pretrained(llama, config=config)
    assert (model.num_labels, model.config.pad_token_id) == (4, 7)
    assert model.score.out_features == 4
    assert CLASSIFIER.from_pretrained(llama, config=str(llama), num_labels=5).num_labels == 5
    with pytest.raises(ConfigError, match="BloomConfig"):
        CAUSAL.from_pretrained(llama, config=AutoConfig.for_model("bloom"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_use_cache_is_honoured(tiny_folder, family):
    for given, expected in ({}, True), ({"use_cache": False}, False), ({"use_cache": None}, True):
        config = CAUSAL.from_pretrained(tiny_folder(family), **given).config
        assert config.use_cache is config.get_text_config(decoder=True).use_cache is expected


def test_a_part_of_a_nested_config(tiny_folder):
    folder = tiny_folder("gemma3")
    whole = AutoConfig.from_pretrained(folder, text_config={"rms_norm_eps": 0.5})
    model = CAUSAL.from_pretrained(folder, text_config={"rms_norm_eps": 0.5})
    assert model.config.text_config.rms_norm_eps == whole.text_config.rms_norm_eps == 0.5
    assert model.config.text_config.hidden_size == whole.text_config.hidden_size


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_config_that_names_kernels_which_are_not_here(tiny_folder, family):
    folder = tiny_folder(family)
    config = AutoConfig.from_pretrained(folder, attn_implementation="flash_attention_2")
    assert CAUSAL.from_pretrained(folder, config=config).config.model_type == family


@pytest.mark.parametrize("cls", [CAUSAL, DistributedLlamaForCausalLM, AutoDistributedConfig])
def test_the_name_by_its_name_in_transformers(llama, cls):
    found = cls.from_pretrained(pretrained_model_name_or_path=llama)
    config = getattr(found, "config", found)
    assert config.model_type == "llama"
    with pytest.raises(ConfigError, match="name of a model"):
        cls.from_pretrained()


class TestLoadingInfo:
    def test_of_a_new_head(self, llama):
        whole = AutoModelForSequenceClassification
        _, expected = whole.from_pretrained(llama, output_loading_info=True)
        model, info = CLASSIFIER.from_pretrained(llama, output_loading_info=True)
        assert info.keys() == expected.keys()
        assert info["missing_keys"] == expected["missing_keys"] == {"score.weight"}
        assert model.score.weight.requires_grad

    def test_of_a_whole_model(self, llama):
        _, info = DistributedLlamaForCausalLM.from_pretrained(llama, output_loading_info=True)
        assert not any(info.values())

    def test_of_a_head_of_another_size(self, llama, tmp_path):
        whole = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
        whole.save_pretrained(tmp_path)
        options = {"num_labels": 5, "ignore_mismatched_sizes": True}
        model, info = CLASSIFIER.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert info["missing_keys"] == {"score.weight"}
        assert model.score.out_features == 5
        with pytest.raises(ModelFilesBroken, match="score"):
            CLASSIFIER.from_pretrained(tmp_path, num_labels=5)
        with pytest.raises(ModelFilesBroken, match="embed_tokens"):
            CLASSIFIER.from_pretrained(tmp_path, vocab_size=90, ignore_mismatched_sizes=True)


class TestFolders:
    def test_a_subfolder(self, llama, tmp_path):
        shutil.copytree(llama, tmp_path / "models" / "tiny")
        local = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="models/tiny")
        model = CAUSAL.from_pretrained(tmp_path, subfolder="models/tiny")
        assert Path(model.config.name_or_path) == tmp_path / "models" / "tiny"
        manager = model.remote_blocks.sequence_manager
        assert (
            manager.model
            == CAUSAL.from_pretrained(
                tmp_path / "models" / "tiny"
            ).remote_blocks.sequence_manager.model
        )
        assert_close(run_here(model, tmp_path / "models" / "tiny")(IDS).logits, local(IDS).logits)

    def test_a_tuned_subfolder(self, llama, tmp_path):
        tuned = CAUSAL.from_pretrained(llama, tuning_mode="ptune", pre_seq_len=2)
        tuned.save_pretrained(tmp_path / "checkpoint-2")
        model = CAUSAL.from_pretrained(tmp_path, subfolder="checkpoint-2")
        assert model.num_prompt_tokens == 2

    def test_a_variant(self, llama, tmp_path):
        shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
        whole = AutoModelForCausalLM.from_pretrained(llama)
        with torch.no_grad():
            whole.lm_head.weight.mul_(2)
        whole.save_pretrained(tmp_path, variant="fp16")
        plain, other = (CAUSAL.from_pretrained(tmp_path, variant=v) for v in (None, "fp16"))
        assert torch.equal(other.lm_head.weight, whole.lm_head.weight)
        assert torch.equal(plain.lm_head.weight * 2, whole.lm_head.weight)
        whole.save_pretrained(tmp_path, variant="two", max_shard_size="20KB")
        assert (tmp_path / "model.safetensors.index.two.json").exists()
        other = CAUSAL.from_pretrained(tmp_path, variant="two")
        assert torch.equal(other.lm_head.weight, whole.lm_head.weight)
        with pytest.raises(ModelFilesBroken, match="variant 'bf16'"):
            CAUSAL.from_pretrained(tmp_path, variant="bf16")


class TestHeads:
    """Checkpoints in which embeddings or head are stored once, or not at all."""

    @pytest.fixture
    def rewritten(self, tiny_folder, tmp_path):
        def write(*names, **settings):
            """Keep the tensors but ``names``."""
            folder = tiny_folder("llama")
            config = AutoConfig.from_pretrained(folder, **settings)
            config.save_pretrained(tmp_path)
            whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
            kept = {name: value for name, value in whole.items() if name not in names}
            save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
            return tmp_path

        return write

    @pytest.mark.parametrize("kind", [CAUSAL, CLASSIFIER, AutoDistributedModel])
    def test_tied_with_the_weight_of_the_head_alone(self, rewritten, kind):
        folder = rewritten("model.embed_tokens.weight", tie_word_embeddings=True)
        stored = load_file(folder / "model.safetensors")["lm_head.weight"]
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert torch.equal(model.get_input_embeddings().weight, stored)
        assert info["missing_keys"] == ({"score.weight"} if kind is CLASSIFIER else set())
        assert not model.get_input_embeddings().weight.requires_grad

    @pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text"])
    def test_tied_with_the_head_alone_in_other_families(self, tiny_folder, tmp_path, family):
        whole = AutoModelForCausalLM.from_pretrained(tiny_folder(family))
        embeddings = whole.get_input_embeddings()
        assert embeddings.weight is whole.lm_head.weight
        (name,) = [f"{path}.weight" for path, m in whole.named_modules() if m is embeddings]
        kept = {key: value for key, value in whole.state_dict().items() if key != name}
        whole.config.save_pretrained(tmp_path)
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for kind in (CAUSAL, CLASSIFIER, AutoDistributedModel):
            model = kind.from_pretrained(tmp_path)
            assert torch.equal(model.get_input_embeddings().weight, embeddings.weight)

    def test_without_a_head(self, rewritten):
        folder = rewritten("lm_head.weight")
        for kind in (CLASSIFIER, AutoDistributedModel):
            kind.from_pretrained(folder)
        with pytest.raises(ModelFilesBroken, match=r"no language-model head \(lm_head") as refusal:
            CAUSAL.from_pretrained(folder)
        assert "AutoDistributedModel" in refusal.value.hint

    @pytest.mark.parametrize("kind", [CAUSAL, CLASSIFIER, AutoDistributedModel])
    def test_without_embeddings(self, rewritten, kind):
        folder = rewritten("model.embed_tokens.weight")
        with pytest.raises(ModelFilesBroken, match=r"model\.embed_tokens\.weight") as refusal:
            kind.from_pretrained(folder)
        assert "download" not in refusal.value.hint


def test_the_options_of_a_call_are_left_alone(llama):
    options = {"dtype": "auto", "device_map": "cpu", "revision": "main", "config": None}
    before = copy.copy(options)
    CAUSAL.from_pretrained(llama, **options)
    assert options == before


class TestAdapters:
    """A name of an adapter loads its base model with it, as transformers does."""

    def test_alone(self, llama, tmp_path):
        save_adapter(llama, tmp_path, modules_to_save=["lm_head"])
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        remote = run_here(CAUSAL.from_pretrained(tmp_path), llama)
        with torch.no_grad():
            assert_close(remote(IDS).logits, stock(IDS).logits)
        assert remote.config.name_or_path == str(llama)
        assert not any(parameter.requires_grad for parameter in remote.parameters())
        remote.delete_adapter()
        plain = AutoModelForCausalLM.from_pretrained(llama)
        with torch.no_grad():
            assert_close(remote(IDS).logits, plain(IDS).logits)

    def test_beside_its_model(self, llama, tmp_path):
        shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
        save_adapter(tmp_path, tmp_path)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        remote = run_here(CAUSAL.from_pretrained(tmp_path), llama)
        with torch.no_grad():
            assert_close(remote(IDS).logits, stock(IDS).logits)

    def test_of_no_model(self, llama, tmp_path):
        save_adapter(llama, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterRefused, match="which model") as refusal:
            CAUSAL.from_pretrained(tmp_path)
        assert "load_adapter" in refusal.value.hint

    def test_of_another_kind(self, llama, tmp_path):
        whole = AutoModelForCausalLM.from_pretrained(llama)
        config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        peft.get_peft_model(whole, config).save_pretrained(tmp_path)
        with pytest.raises(AdapterRefused, match="IA3"):
            CAUSAL.from_pretrained(tmp_path)
