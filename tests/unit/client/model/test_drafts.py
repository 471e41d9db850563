"""Drafts in the tokens of another tokenizer, and at the end of a session."""

import string

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from support.local_blocks import tiny_pair

PROMPT = torch.tensor([[11, 54, 7, 11, 54, 23, 90]])


@pytest.fixture(scope="module")
def models():
    return tiny_pair("llama")


@pytest.fixture(scope="module")
def tokenizers():
    def tokenizer(units):
        vocabulary = {unit: number for number, unit in enumerate(units)}
        pairs = [(unit[0], unit[1]) for unit in units if len(unit) == 2]
        model = BPE(vocab=vocabulary, merges=pairs, unk_token=units[0])
        found = Tokenizer(model)
        found.decoder = Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=found, unk_token=units[0])

    letters = [*string.ascii_letters, *string.digits, *" .,"]
    pairs = [first + second for first in "abcdef" for second in "abcdef"]
    return tokenizer((letters + pairs)[:96]), tokenizer(letters[::-1] + pairs[::-1])


def options_of(tokenizers):
    draft = tiny_pair("llama", vocab_size=104)[0]
    names = ("assistant_model", "tokenizer", "assistant_tokenizer")
    return dict(zip(names, (draft, *tokenizers))) | {"do_sample": False}


def test_drafts_in_other_tokens_need_no_longer_session(models, tokenizers):
    """How many tokens of the model's own such a draft has is not known before it is made."""
    local, remote = models
    options = options_of(tokenizers)
    for length in range(5, 10):
        ids = torch.arange(3, 3 + 9 * length, 9)[None]
        expected = local.generate(ids, max_new_tokens=20, use_cache=True, **options)
        assert torch.equal(remote.generate(ids, max_new_tokens=20, **options), expected)
        assert remote.remote_blocks.runner.sessions[-1].max_length == length + 19


def test_drafts_fit_in_the_rest_of_a_session(models, tokenizers):
    local, remote = models
    loop = PROMPT[:, :3].repeat(1, 4)
    for options in (options_of(tokenizers), {"prompt_lookup_num_tokens": 8}):
        expected = local.generate(loop, max_new_tokens=10, use_cache=True)
        end = {"eos_token_id": expected[0, -1].item()}
        expected = local.generate(loop, max_new_tokens=10, use_cache=True, **end)
        with remote.inference_session(max_length=expected.shape[1] - 1):
            actual = remote.generate(loop, max_new_tokens=30, **end, **options)
        assert torch.equal(actual, expected)
