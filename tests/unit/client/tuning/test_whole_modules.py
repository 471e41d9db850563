"""Adapters that train embeddings, norm or head as a whole: equal to peft before, during, after."""

import copy

import peft
import pytest
import torch

from petals import LoraConfig
from petals.errors import AdapterRefused
from petals.models.loading.head import HeadKind
from support.local_blocks import tiny_pair
from support.lora_trainee import train
from support.reference import assert_close

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj"]
CASES = [
    (ties_model, modules, ties_adapter)
    for ties_model in (False, True)
    for modules in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["model.norm"])
    for ties_adapter in (False, True)
    if ties_model or not ties_adapter
]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]:d}-{'+'.join(case[1])}-{case[2]:d}")
def case(request):
    """(local model, remote model, settings of the adapter)."""
    ties_model, modules, ties_adapter = request.param
    settings = {"r": 3, "target_modules": TARGETS, "modules_to_save": modules}
    if ties_adapter:
        settings["ensure_weight_tying"] = True
    return *tiny_pair("llama", tie_word_embeddings=ties_model), settings


def adapted(local, seed=0, **settings):
    """The local model under peft, every trained tensor of the adapter random."""
    model = peft.get_peft_model(copy.deepcopy(local), peft.LoraConfig(**settings)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model


def loaded(local, folder, **options):
    return peft.PeftModel.from_pretrained(copy.deepcopy(local), str(folder), **options).eval()


def num_trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def same(remote, expected):
    with torch.no_grad():
        assert_close(remote(IDS).logits, expected(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    actual = remote.generate(input_ids=IDS, **options)
    assert torch.equal(actual, expected.generate(input_ids=IDS, **options))


def test_an_adapter_of_peft_before_during_and_after(case, tmp_path):
    local, remote, settings = case
    whole = adapted(local, **settings)
    whole.save_pretrained(tmp_path / "whole")
    plain = adapted(local, seed=1, target_modules=["o_proj"])
    plain.save_pretrained(tmp_path / "plain")
    originals = dict(remote.named_parameters(remove_duplicate=False))
    for _ in range(2):
        same(remote, local)
        remote.load_adapter(tmp_path / "whole")
        same(remote, whole)
        remote.load_adapter(tmp_path / "plain")
        same(remote, plain)
        remote.load_adapter(tmp_path / "whole")
        remote.delete_adapter()
    same(remote, local)
    again = dict(remote.named_parameters(remove_duplicate=False))
    assert all(again[name] is parameter for name, parameter in originals.items())


def test_training_and_what_peft_makes_of_the_result(case, tmp_path):
    local, remote, settings = case
    adapted(local, **settings).save_pretrained(tmp_path / "begin")
    remote.load_adapter(tmp_path / "begin", is_trainable=True)
    expected = loaded(local, tmp_path / "begin", is_trainable=True)
    trained = [
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (remote, expected)
    ]
    assert trained[0] == trained[1]
    assert train(remote, IDS, 4) == pytest.approx(train(expected, IDS, 4), rel=1e-4)
    remote.save_adapter(tmp_path / "end")
    same(loaded(local, tmp_path / "end"), remote)
    remote.delete_adapter()
    same(remote, local)
    remote.load_adapter(tmp_path / "end")
    same(remote, loaded(local, tmp_path / "end"))


def test_a_new_adapter_trains_copies(case):
    local, remote, settings = case
    remote.add_adapter(LoraConfig(**settings))
    same(remote, local)
    losses = train(remote, IDS, 3)
    assert losses[-1] < losses[0]
    remote.delete_adapter()
    same(remote, local)
    assert not any(parameter.requires_grad for parameter in remote.parameters())


@pytest.mark.parametrize(
    ("family", "target", "module"),
    [
        ("gpt2", "c_attn", "wte"),
        ("bloom", "query_key_value", "word_embeddings"),
        ("gemma3_text", "q_proj", "embed_tokens"),
        ("mpt", "Wqkv", "lm_head"),
    ],
)
def test_tied_models_of_other_families(family, target, module, tmp_path):
    local, remote = tiny_pair(family)
    whole = adapted(local, target_modules=[target], modules_to_save=[module])
    whole.save_pretrained(tmp_path)
    remote.load_adapter(tmp_path)
    same(remote, whole)
    remote.delete_adapter()
    same(remote, local)


def test_a_new_adapter_takes_the_place_of_the_present_one():
    local, remote = tiny_pair("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    remote.add_adapter(config)
    train(remote, IDS, 3)
    remote.add_adapter(config)
    same(remote, local)


def test_a_refused_adapter_changes_nothing(tmp_path):
    local, remote = tiny_pair("llama")
    settings = {"target_modules": TARGETS, "modules_to_save": ["lm_head"]}
    whole = adapted(local, **settings)
    whole.save_pretrained(tmp_path / "whole")
    wide = copy.deepcopy(local)
    wide.resize_token_embeddings(99, mean_resizing=False)
    adapted(wide, **settings).save_pretrained(tmp_path / "wide")
    remote.load_adapter(tmp_path / "whole")
    with pytest.raises(AdapterRefused, match=r"lm_head\.weight \[99, 32\]") as refusal:
        remote.load_adapter(tmp_path / "wide")
    assert "resize_token_embeddings" in refusal.value.hint
    with pytest.raises(AdapterRefused, match="score"):
        remote.add_adapter(LoraConfig(target_modules=TARGETS, modules_to_save=["score"]))
    same(remote, whole)


def test_embeddings_resized_under_an_adapter_are_not_silently_kept():
    _, remote = tiny_pair("llama")
    remote.add_adapter(LoraConfig(target_modules=TARGETS, modules_to_save=["embed_tokens"]))
    remote.resize_token_embeddings(99, mean_resizing=False)
    with pytest.raises(AdapterRefused, match="resized"):
        remote.delete_adapter()
    assert remote.remote_blocks.lora is not None


def test_the_originals_follow_a_change_of_dtype():
    local, remote = tiny_pair("llama", HeadKind.SEQUENCE_CLASSIFICATION)
    remote.add_adapter(LoraConfig(target_modules=TARGETS, modules_to_save=["score"]))
    remote.to(torch.bfloat16)
    remote.delete_adapter()
    assert remote.score.weight.dtype == torch.bfloat16
    assert_close(remote.score.weight, local.score.weight.bfloat16())
