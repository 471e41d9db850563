"""A checkpoint's own generation_config.json has the effect that it has in transformers."""

import json

import pytest
import torch
from transformers import GenerationConfig

from petals.errors import NotSupported
from support.local_blocks import tiny_pair

PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])
REPLY = torch.tensor([[8, 41, 77]])
BEAMS = {"num_beams": 3}
SAMPLE = {"do_sample": True, "temperature": 3.0}
LOOKUP = {"prompt_lookup_num_tokens": 3}

SETTINGS = {
    "max_length": {"max_length": 12},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 14, "eos_token_id": list(range(90))},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": list(range(90))},
    "early_stopping": BEAMS | {"early_stopping": True, "eos_token_id": [3, 4, 5]},
    "max_time": {"max_time": 1e4},
    "do_sample": SAMPLE,
    "num_beams": BEAMS,
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "hybrid"},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"max_cache_len": 100},
    "temperature": SAMPLE,
    "top_k": SAMPLE | {"top_k": 3},
    "top_p": SAMPLE | {"top_p": 0.4},
    "min_p": SAMPLE | {"min_p": 0.1},
    "top_h": SAMPLE | {"top_h": 0.4},
    "typical_p": SAMPLE | {"typical_p": 0.4},
    "epsilon_cutoff": SAMPLE | {"epsilon_cutoff": 0.01},
    "eta_cutoff": SAMPLE | {"eta_cutoff": 0.01},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "length_penalty": BEAMS | {"length_penalty": -2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(40)]},
    "renormalize_logits": SAMPLE | {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": [2, 9.0],
        "eos_token_id": 9,
    },
    "suppress_tokens": {"suppress_tokens": list(range(40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(60))},
    "sequence_bias": {"sequence_bias": [[[9], 10.0]]},
    "token_healing": {"token_healing": False},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": {"bias": 9.0}},
    "num_return_sequences": SAMPLE | {"num_return_sequences": 2},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 54},
    "bos_token_id": {"bos_token_id": 9},
    "eos_token_id": {"eos_token_id": list(range(48))},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 9},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.5},
    "prompt_lookup_num_tokens": LOOKUP,
    "max_matching_ngram_size": LOOKUP | {"max_matching_ngram_size": 1},
    "assistant_early_exit": {"assistant_early_exit": 2},
    "assistant_lookbehind": {"assistant_lookbehind": 4},
    "target_lookbehind": {"target_lookbehind": 4},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "disable_compile": {"disable_compile": True},
    "low_memory": {"low_memory": True},
    "diversity_penalty": {"diversity_penalty": 0.0},
    "prefill_chunk_size": {"prefill_chunk_size": 3},
}
"""Option -> a generation_config.json in which it has an effect, if it ever has one."""

REFUSED = {
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "num_beam_groups": {"num_beam_groups": 3, "num_beams": 3, "diversity_penalty": 1.0},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
}
"""Options whose code transformers fetches from the hub: it raises ValueError."""

NOT_OF_A_CHECKPOINT = {
    "stop_strings",  # needs a tokenizer in the call; then it is a stopping criterion
    "is_assistant",  # set by transformers for the model that drafts
    "use_mtp",  # transformers raises without weights for it: see test_mtp
    "speculation_type",  # read only where the call has a model that drafts
    "compile_config",  # transformers refuses the form that it has in a file
    "continuous_batching_config",  # read by generate_batch only
    "_from_model_config",
    "transformers_version",
}


def test_every_option_is_here():
    assert {*SETTINGS, *REFUSED, *NOT_OF_A_CHECKPOINT} == set(vars(GenerationConfig()))


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("llama")


@pytest.fixture
def configured(pair, tmp_path):
    """Both models with the generation config of a checkpoint that holds ``settings``."""
    before = [model.generation_config for model in pair]

    def configure(settings):
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0} | settings))
        for model in pair:
            model.generation_config = GenerationConfig.from_pretrained(tmp_path)
        return pair

    yield configure
    for model, config in zip(pair, before):
        model.generation_config = config


def generated(model, ids, settings, **options):
    if not {"max_length", "max_new_tokens"} & set(settings):
        options["max_new_tokens"] = 8
    torch.manual_seed(4)
    result = model.generate(ids, **options)
    if settings.get("return_dict_in_generate"):
        for name in ("scores", "logits"):
            assert (getattr(result, name) is None) == (not settings.get(f"output_{name}"))
        return result.sequences
    return result


@pytest.mark.parametrize("option", SETTINGS)
def test_the_text_is_that_of_transformers(configured, option):
    settings = SETTINGS[option]
    local, remote = configured(settings)
    expected = generated(local, PROMPT, settings)
    assert torch.equal(generated(remote, PROMPT, settings), expected)
    own = GenerationConfig.from_dict(local.generation_config.to_dict())
    given = generated(remote, PROMPT, settings, generation_config=own)
    assert torch.equal(given, expected)
    with remote.inference_session(max_length=60):
        first = generated(remote, PROMPT, settings)
        assert torch.equal(first, expected)
        if option == "max_length" or len(first) > 1:
            return
        second = generated(remote, REPLY, settings)
    whole = torch.cat([first, REPLY], dim=1)
    assert torch.equal(second, generated(local, whole, settings)[:, first.shape[1] :])


@pytest.mark.parametrize("option", REFUSED)
def test_modes_of_the_hub_are_refused_as_in_transformers(configured, option):
    local, remote = configured(REFUSED[option])
    with pytest.raises(ValueError):
        local.generate(PROMPT, max_new_tokens=3)
    with pytest.raises(NotSupported):
        remote.generate(PROMPT, max_new_tokens=3)


def test_mtp(configured):
    plain = configured({})[0].generate(PROMPT, max_new_tokens=5)
    local, remote = configured({"use_mtp": True})
    with pytest.raises(ValueError, match="mtp"):
        local.generate(PROMPT, max_new_tokens=5)
    assert torch.equal(remote.generate(PROMPT, max_new_tokens=5), plain)


@pytest.mark.parametrize(
    "name", ["static", "hybrid", "sliding_window", "dynamic", "offloaded", "quantized"]
)
def test_every_cache_of_a_checkpoint(configured, name):
    plain = configured({})[0].generate(PROMPT, max_new_tokens=5)
    remote = configured({"cache_implementation": name})[1]
    assert torch.equal(remote.generate(PROMPT, max_new_tokens=5), plain)
    with remote.inference_session(max_length=20):
        assert torch.equal(remote.generate(PROMPT, max_new_tokens=5), plain)
