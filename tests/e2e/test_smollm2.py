"""A real model through three real servers generates, token for token, what it generates locally."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from petals.testing.equality import assert_same_tokens

QUESTION = [{"role": "user", "content": "Name three colours and say why you like them."}]


@pytest.fixture(scope="module")
def question(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def random_assistant(vocab_size: int) -> LlamaForCausalLM:
    """It guesses wrong nearly always, so every step rolls back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


MODES = {
    "greedy": {"max_new_tokens": 40},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_generate(
    smollm2: PreTrainedModel, smollm2_local: PreTrainedModel, question: torch.Tensor, mode: str
) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, **MODES[mode]}
    if mode == "assisted":
        options["assistant_model"] = random_assistant(smollm2.config.vocab_size)
    outputs = []
    for model in (smollm2_local, smollm2):
        torch.manual_seed(17)
        outputs.append(model.generate(question, **options))
    if mode in ("greedy", "assisted"):
        assert_same_tokens(smollm2_local, outputs[0][0], outputs[1][0])
    else:
        assert torch.equal(*outputs)


def test_prompt_of_a_thousand_tokens(
    smollm2: PreTrainedModel, smollm2_local: PreTrainedModel
) -> None:
    prompt = torch.randint(100, 20_000, (1, 1000), generator=torch.Generator().manual_seed(3))
    expected = smollm2_local.generate(prompt, max_new_tokens=8, do_sample=False)
    actual = smollm2.generate(prompt, max_new_tokens=8, do_sample=False)
    assert_same_tokens(smollm2_local, expected[0], actual[0])
