"""A real model through three real servers says, token for token, what it says at home."""

import threading

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


def test_greedy(smollm2: PreTrainedModel, smollm2_local: PreTrainedModel, question: torch.Tensor):
    expected = smollm2_local.generate(question, max_new_tokens=40, do_sample=False)
    actual = smollm2.generate(question, max_new_tokens=40, do_sample=False)
    assert_same_tokens(smollm2_local, expected[0], actual[0])


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 4},
    ],
    ids=["sampling", "beams", "lookup"],
)
def test_modes_of_generate(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    question: torch.Tensor,
    mode: dict[str, object],
):
    outputs = []
    for model in (smollm2_local, smollm2):
        torch.manual_seed(17)
        outputs.append(model.generate(question, max_new_tokens=24, **mode))
    assert torch.equal(*outputs)


def test_assisted_by_a_small_local_model(
    smollm2: PreTrainedModel, smollm2_local: PreTrainedModel, question: torch.Tensor
):
    """A random assistant guesses wrong nearly always, so every step rolls back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=smollm2.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assistant = LlamaForCausalLM(config).eval()
    expected = smollm2_local.generate(question, max_new_tokens=16, do_sample=False)
    actual = smollm2.generate(
        question, max_new_tokens=16, do_sample=False, assistant_model=assistant
    )
    assert_same_tokens(smollm2_local, expected[0], actual[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_prompt_alone(
    smollm2: PreTrainedModel,
    smollm2_local: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    side: str,
):
    texts = [
        "The capital of France is",
        "Once upon a time there was a small robot who",
        "One, two,",
    ]
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    if side == "left":
        outputs = smollm2.generate(**batch, max_new_tokens=12, do_sample=False)
        for text, output in zip(texts, outputs):
            alone = tokenizer(text, return_tensors="pt")["input_ids"]
            expected = smollm2_local.generate(alone, max_new_tokens=12, do_sample=False)
            assert_same_tokens(smollm2_local, expected[0], output[-expected.shape[1] :])
        return
    with torch.inference_mode():
        logits = smollm2(**batch).logits
        for row, text in enumerate(texts):
            alone = tokenizer(text, return_tensors="pt")["input_ids"]
            expected = smollm2_local(alone).logits[0]
            torch.testing.assert_close(
                logits[row, : alone.shape[1]], expected, rtol=1e-4, atol=1e-3
            )


def test_prompt_of_a_thousand_tokens(smollm2: PreTrainedModel, smollm2_local: PreTrainedModel):
    prompt = torch.randint(100, 20_000, (1, 1000), generator=torch.Generator().manual_seed(3))
    expected = smollm2_local.generate(prompt, max_new_tokens=8, do_sample=False)
    actual = smollm2.generate(prompt, max_new_tokens=8, do_sample=False)
    assert_same_tokens(smollm2_local, expected[0], actual[0])


def test_a_session_is_continued_turn_by_turn(
    smollm2: PreTrainedModel, smollm2_local: PreTrainedModel, question: torch.Tensor
):
    expected = smollm2_local.generate(question, max_new_tokens=20, do_sample=False)
    with smollm2.inference_session(max_length=question.shape[1] + 20) as session:
        first = smollm2.generate(question, max_new_tokens=8, do_sample=False, session=session)
        second = smollm2.generate(None, max_new_tokens=12, do_sample=False, session=session)
        assert session.position >= expected.shape[1] - 1
    whole = torch.cat([first[0], second[0]])
    assert_same_tokens(smollm2_local, expected[0], whole)


def test_eight_sessions_at_once_each_get_their_own_words(
    smollm2: PreTrainedModel, smollm2_local: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    topics = ["rivers", "stars", "bread", "trains", "birds", "salt", "glass", "rain"]
    prompts = [tokenizer(f"A short note about {t}:", return_tensors="pt") for t in topics]
    outputs: dict[int, torch.Tensor] = {}

    def chat(index: int) -> None:
        ids = prompts[index]["input_ids"]
        outputs[index] = smollm2.generate(ids, max_new_tokens=16, do_sample=False)[0]

    threads = [threading.Thread(target=chat, args=(index,)) for index in range(len(topics))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, prompt in enumerate(prompts):
        expected = smollm2_local.generate(prompt["input_ids"], max_new_tokens=16, do_sample=False)
        assert_same_tokens(smollm2_local, expected[0], outputs[index])


def test_custom_paths_and_hidden_states(smollm2: PreTrainedModel, smollm2_local: PreTrainedModel):
    """Blocks [7, 23) cross all three servers; the client runs them in a session and without."""
    blocks = smollm2.model.layers
    assert len(blocks) == 30 and len(blocks[7:23]) == 16
    hidden = torch.randn(1, 6, 576, generator=torch.Generator().manual_seed(5))
    rotary = smollm2_local.model.rotary_emb(hidden, torch.arange(6)[None])
    expected = hidden
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        for layer in smollm2_local.model.layers[7:23]:
            expected = layer(expected, attention_mask=mask, position_embeddings=rotary)
        whole = blocks[7:23](hidden)
        with blocks[7:23].inference_session(max_length=6) as session:
            parts = [session.step(hidden[:, :4]), session.step(hidden[:, 4:5])]
            session.position = 4
            parts[1] = session.step(hidden[:, 4:])
    # The model has a few states of magnitude 1000 among many of 1: errors are relative to the row.
    # Servers lay matrices as is fastest where they run, and so sum in an order of their own: after
    # sixteen blocks up to 1.1e-5 was seen, in states that come from no text.
    for actual in (whole, torch.cat(parts, dim=1)):
        error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 1e-4
