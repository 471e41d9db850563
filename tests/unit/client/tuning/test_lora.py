"""Adapters of a model with remote blocks: trained here, saved, loaded, against stock peft."""

import copy
import inspect
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers.integrations import PeftAdapterMixin

from petals import LoraConfig
from petals.errors import AdapterRefused, ConfigError, ModelNotFound
from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair
from support.lora_trainee import train
from support.reference import assert_close

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
ARCHITECTURES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bloom": ["query_key_value", "dense"],
    "gpt2": ["c_attn"],
    "mixtral": ["q_proj", "o_proj"],
    "falcon": ["query_key_value"],
    "gemma2": "all-linear",
    "qwen3": "all-linear",
    "opt": ["fc1", "k_proj"],
    "mpt": ["Wqkv"],
    "gptj": ["q_proj"],
    "deepseek_v3": ["kv_b_proj", "o_proj"],
    "qwen3_next": ["q_proj", "out_proj"],
}


def scatter(model, seed=0):
    """Random values for every matrix of an adapter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)


def add(remote, **settings):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings
    remote.add_adapter(LoraConfig(**settings))
    scatter(remote)
    return remote


def under_peft(local, folder, **options):
    return peft.PeftModel.from_pretrained(copy.deepcopy(local), str(folder), **options).eval()


def named_gradients(model, blocks_path):
    """(block, module, A or B) -> gradient, for a remote model and for one of peft."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            _, _, tail = name.partition(f"{blocks_path}.")
            parts = tail.removeprefix("lora.").removesuffix(".default.weight").split(".")
            found[int(parts[0]), ".".join(parts[1:-1]), parts[-1]] = parameter.grad
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_peft(family, tmp_path):
    local, remote = tiny_pair(family)
    add(remote, target_modules=ARCHITECTURES[family])
    remote.save_adapter(tmp_path)
    expected = under_peft(local, tmp_path, is_trainable=True)
    losses = [model(IDS, labels=IDS, use_cache=False).loss for model in (remote, expected)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    ours, theirs = (named_gradients(model, remote.blocks_path) for model in (remote, expected))
    assert ours.keys() == theirs.keys()
    assert_close([ours[slot] for slot in theirs], list(theirs.values()))
    assert all("lora" in name for name, p in remote.named_parameters() if p.requires_grad)


def test_training_here_equals_training_with_peft(tmp_path):
    local, remote = tiny_pair("llama")
    add(remote, use_rslora=True, rank_pattern={"v_proj": 5}, layers_to_transform=[1, 4])
    remote.save_adapter(tmp_path / "before")
    expected = under_peft(local, tmp_path / "before", is_trainable=True)
    losses = train(remote, IDS, 5)
    assert losses == pytest.approx(train(expected, IDS, 5), rel=1e-5)
    assert losses[-1] < losses[0]
    remote.save_adapter(tmp_path / "after")
    with torch.no_grad():
        assert_close(under_peft(local, tmp_path / "after")(IDS).logits, expected(IDS).logits)


def test_what_peft_has_saved_is_loaded_and_generates_the_same(tmp_path):
    local, remote = tiny_pair("llama")
    config = peft.LoraConfig(
        r=4, target_modules=["o_proj"], alpha_pattern={"layers.2.self_attn.o_proj": 20}
    )
    adapted = peft.get_peft_model(copy.deepcopy(local), config).eval()
    scatter(adapted)
    adapted.save_pretrained(tmp_path)
    plain = remote.generate(IDS, max_new_tokens=6, do_sample=False)
    remote.load_adapter(tmp_path)
    expected = adapted.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(remote.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    assert not torch.equal(expected, plain)
    assert not any(parameter.requires_grad for parameter in remote.parameters())
    remote.delete_adapter()
    assert torch.equal(remote.generate(IDS, max_new_tokens=6, do_sample=False), plain)


def test_a_session_keeps_the_adapter_it_was_opened_with():
    _, remote = tiny_pair("llama")
    add(remote)
    with torch.no_grad(), remote.inference_session(max_length=9):
        first = remote(IDS[:1, :4]).logits
        scatter(remote, seed=5)
        second = remote(IDS[:1, 4:]).logits
    scatter(remote, seed=0)
    whole = remote(IDS[:1], use_cache=False).logits
    assert_close(torch.cat([first, second], dim=1), whole)


def test_a_classifier_trains_its_head_beside_the_adapter(tmp_path):
    local, remote = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    add(remote, modules_to_save=["score"])
    remote.save_adapter(tmp_path)
    expected = under_peft(local, tmp_path, is_trainable=True)
    labels = torch.tensor([0, 1, 1])
    for model in (remote, expected):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * 5 + 1
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(IDS, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
    remote.save_adapter(tmp_path)
    _, fresh = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    fresh.load_adapter(tmp_path)
    with torch.no_grad():
        logits = expected(IDS).logits
        assert_close(under_peft(local, tmp_path)(IDS).logits, logits)
        assert_close(fresh(IDS).logits, logits)


def test_a_state_dict_resumes():
    _, remote = tiny_pair("llama")
    add(remote)
    state = {name: value for name, value in remote.state_dict().items() if "lora" in name}
    assert "model.layers.lora.0.self_attn.q_proj.lora_A" in state
    _, again = tiny_pair("llama")
    again.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    again.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, remote(IDS).logits)


def test_a_new_adapter_changes_nothing_until_it_is_trained():
    _, remote = tiny_pair("llama")
    before = remote(IDS).logits
    remote.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(remote(IDS, use_cache=False).logits, before)
    assert "rank 2" in repr(remote.remote_blocks.lora)


def test_a_slice_of_the_blocks_takes_its_part():
    _, remote = tiny_pair("llama")
    blocks = add(remote).remote_blocks
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert_close(blocks[2:](blocks[:2](hidden)), blocks(hidden))
    blocks[3](hidden).sum().backward()
    trained = [name for name, p in blocks.lora.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name in trained} == {"3"}


def test_stock_peft_adapts_the_clients_own_parts(tmp_path):
    local, remote = tiny_pair("llama")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"])
    models = [
        peft.get_peft_model(copy.deepcopy(local), config),
        peft.get_peft_model(remote, config),
    ]
    for model in models:
        scatter(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    with torch.no_grad():
        first, second = (model(input_ids=IDS).logits for model in models)
    assert_close(second, first)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LoraConfig, {"target_modules": ["w_proj"]}, "No matrix"),
        (LoraConfig, {"target_modules": ["experts"]}, "No matrix"),
        (LoraConfig, {"r": 0}, "rank"),
        (LoraConfig, {"modules_to_save": ["score"]}, "score"),
        (peft.LoraConfig, {"use_dora": True}, None),
        (peft.IA3Config, {"feedforward_modules": []}, None),
        (SimpleNamespace, {}, "not the config of an adapter"),
    ],
)
def test_configs_that_the_model_cannot_run_are_refused(kind, settings, message):
    _, remote = tiny_pair("llama")
    with pytest.raises(AdapterRefused, match=message) as caught:
        remote.add_adapter(kind(**{"target_modules": ["q_proj"]} | settings))
    assert caught.value.hint
    assert remote.remote_blocks.lora is None


def test_dropout_has_no_effect_and_warns():
    _, remote = tiny_pair("llama")
    with pytest.warns(UserWarning, match="lora_dropout"):
        add(remote, lora_dropout=0.1)


def test_adapters_of_other_models_are_refused(tmp_path):
    _, bloom = tiny_pair("bloom")
    add(bloom, target_modules=["query_key_value"]).save_adapter(tmp_path / "bloom")
    _, classifier = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    add(classifier, modules_to_save=["score"]).save_adapter(tmp_path / "classifier")
    _, wide = tiny_pair("llama", num_attention_heads=8)
    add(wide).save_adapter(tmp_path / "wide")
    _, remote = tiny_pair("llama")
    for name in ("bloom", "classifier", "wide"):
        with pytest.raises(AdapterRefused):
            remote.load_adapter(tmp_path / name)
    with pytest.raises(ModelNotFound):
        remote.load_adapter(tmp_path / "none")
    with pytest.raises(AdapterRefused, match="no adapter to save"):
        remote.save_adapter(tmp_path / "nothing")
    assert remote.remote_blocks.lora is None


class TestMethodsOfTransformers:
    """What transformers' models have for peft works with the one adapter, or says why not."""

    def test_every_one_is_decided(self):
        _, remote = tiny_pair("llama")
        stock = {name for name in vars(PeftAdapterMixin) if not name.startswith("_")}
        assert {"load_adapter", "set_adapter", "disable_adapters"} <= stock
        for name in stock:
            assert getattr(type(remote), name) is not getattr(PeftAdapterMixin, name)

    def test_names(self, tmp_path):
        _, remote = tiny_pair("llama")
        assert remote.active_adapters() == []
        with pytest.raises(AdapterRefused, match="no adapter"):
            remote.set_adapter("mine")
        remote.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "mine")
        assert remote.active_adapters() == ["mine"]
        remote.save_adapter(tmp_path)
        remote.load_adapter(tmp_path)
        assert remote.active_adapters() == ["default"]
        remote.load_adapter(tmp_path, adapter_name="other")
        remote.set_adapter("other")
        remote.set_adapter(["other"])
        with pytest.raises(AdapterRefused, match="the adapter other, not mine"):
            remote.set_adapter("mine")
        with pytest.raises(AdapterRefused, match="not mine"):
            remote.delete_adapter("mine")
        remote.delete_adapter("other")
        assert remote.active_adapters() == []

    @pytest.mark.parametrize(
        "name",
        ["disable_adapters", "enable_adapters", "get_adapter_state_dict", "enable_peft_hotswap"],
    )
    def test_what_needs_local_layers(self, name):
        with pytest.raises(AdapterRefused, match=name) as refusal:
            getattr(add(tiny_pair("llama")[1]), name)()
        assert "adapter" in refusal.value.hint

    def test_pasted_calls_of_load_adapter(self, tmp_path):
        _, remote = tiny_pair("llama")
        add(remote).save_adapter(tmp_path / "one" / "inner")
        for function in (PeftAdapterMixin.load_adapter, peft.PeftModel.load_adapter):
            names = inspect.signature(function).parameters.keys() - {
                *("self", "kwargs", "peft_model_id", "model_id", "adapter_name", "is_trainable")
            }
            remote.load_adapter(tmp_path / "one" / "inner", **dict.fromkeys(names))
        remote.load_adapter(tmp_path / "one", subfolder="inner", torch_device="cpu")
        remote.load_adapter(tmp_path / "one", adapter_kwargs={"subfolder": "inner"})
        for options in ({"adapter_state_dict": {"x": 1}}, {"no_such_option": 1}):
            with pytest.raises(ConfigError, match=next(iter(options))) as refusal:
                remote.load_adapter(tmp_path / "one" / "inner", **options)
            assert refusal.value.hint
