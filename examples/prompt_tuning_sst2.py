# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sentiment of film reviews: prompts trained through a swarm
#
# The blocks of the model stay on servers, frozen. Trained are a few vectors before each review,
# others added inside each block (`deep_ptune`), and a small head: all of them live here, as do the
# optimizer and the reviews' labels. Then the same training is done on a local model, to see that
# nothing differs.
#
# As a script: `python examples/prompt_tuning_sst2.py` (about a quarter of an hour on two cores),
# `--short` for a minute's look, `--result FILE` to keep the numbers.

# %%
from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from tutorial import AtHome, Record, chart, load_reviews, read_options, swarm_of

from petals import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)

options = read_options("Sentiment of film reviews: prompts trained through a swarm")
record = Record("Sentiment of film reviews, deep prompt tuning through a swarm")
NUM_STEPS, BATCH, NUM_TEST = (2, 2, 4) if options.short else (80, 8, 300)
NUM_PROMPTS, MAX_TOKENS, RATE, HEAD_RATE = 8, 64, 5e-3, 3e-4

# %% [markdown]
# ## Reviews
#
# Rotten Tomatoes snippets, labelled fresh or rotten, stand in for SST-2 (`--data hub` takes SST-2
# itself). Films that are tested on are not trained on.

# %%
train, test = load_reviews(options.data)
test = test[:NUM_TEST]
majority = max(sum(label for _, label in test), sum(1 - label for _, label in test)) / len(test)
record.keep(f"{len(train)} reviews to train on, {len(test)} of other films to test on")
record.keep(f"accuracy of the larger class: {majority:.3f}")

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.padding_side = "right"


def encode(texts: list[str]) -> dict[str, torch.Tensor]:
    asked = [f"Review: {text}\nThis film is" for text in texts]
    return tokenizer(
        asked, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
    )


def batches(reviews: list, size: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    groups = [reviews[first : first + size] for first in range(0, len(reviews), size)]
    return [
        (encode([text for text, _ in group]), torch.tensor([label for _, label in group]))
        for group in groups
    ]


# %% [markdown]
# ## The swarm
#
# Three servers of ten blocks each, on this machine; `--join ADDR` uses a swarm that is there
# already.

# %%
config = AutoConfig.from_pretrained(options.model)
swarm = ExitStack()
initial_peers = swarm.enter_context(swarm_of(options, config.num_hidden_layers))
record.say(f"through the swarm at {initial_peers[0]}")

# %% [markdown]
# ## What the model says untrained
#
# Asked in words, it answers with one of two; the likelier one counts.

# %%
speaker = AutoDistributedModelForCausalLM.from_pretrained(
    options.model, initial_peers=initial_peers, dtype=torch.float32
)
ANSWERS = [tokenizer.encode(word, add_special_tokens=False)[0] for word in (" bad", " good")]


@torch.inference_mode()
def zero_shot(reviews: list) -> float:
    right = 0
    for encoded, labels in batches(reviews, 16):
        logits = speaker(**encoded).logits
        last = encoded["attention_mask"].sum(1) - 1
        said = logits[torch.arange(len(last)), last][:, ANSWERS].argmax(1)
        right += int((said == labels).sum())
    return right / len(reviews)


record.keep(f"accuracy untrained, asked in words: {zero_shot(test):.3f}")

# %% [markdown]
# ## Training
#
# An ordinary loop. `model.parameters()` that require gradients are the prompts and the head alone.
# The head begins as the model's own vectors of the two words, so that it knows what was known.

# %%
model = AutoDistributedModelForSequenceClassification.from_pretrained(
    options.model,
    initial_peers=initial_peers,
    tuning_mode="deep_ptune",
    pre_seq_len=NUM_PROMPTS,
    num_labels=2,
    dtype=torch.float32,
)
model.config.pad_token_id = tokenizer.pad_token_id
model.score.weight.data.copy_(speaker.get_output_embeddings().weight[ANSWERS])
trained = [p for p in model.parameters() if p.requires_grad]
record.keep(f"{sum(p.numel() for p in trained):,} parameters are trained, all of them here")

# The local twin begins with the same values.
whole = AutoModelForSequenceClassification.from_pretrained(
    options.model, num_labels=2, dtype=torch.float32
)
whole.score.weight.data.copy_(model.score.weight.data)
deep = model.intermediate_prompt_embeddings.weight.view(NUM_PROMPTS, config.num_hidden_layers, -1)
home = AtHome(whole.eval(), model.prompt_embeddings.weight, deep.transpose(0, 1))
whole.score.requires_grad_()


def swarm_logits(encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**encoded).logits


def home_logits(encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    states = home.states(**encoded)
    last = encoded["attention_mask"].sum(1) - 1
    return whole.score(states[torch.arange(len(last)), last])


def fit(logits_of: Callable, prompts: list, head: torch.nn.Parameter, name: str) -> list[float]:
    groups = [{"params": prompts, "lr": RATE}, {"params": [head], "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for step, (encoded, labels) in enumerate(batches(train[: NUM_STEPS * BATCH], BATCH), start=1):
        loss = torch.nn.functional.cross_entropy(logits_of(encoded), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        record.say(f"{name}: step {step} of {NUM_STEPS}, loss {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def accuracy(logits_of: Callable) -> float:
    right = sum(
        int((logits_of(encoded).argmax(1) == labels).sum()) for encoded, labels in batches(test, 16)
    )
    return right / len(test)


prompts = [model.prompt_embeddings.weight, model.intermediate_prompt_embeddings.weight]
losses = fit(swarm_logits, prompts, model.score.weight, "swarm")
record.block(chart(losses))

# %%
found = accuracy(swarm_logits)
record.keep(f"accuracy tuned through the swarm: {found:.3f}")

# %% [markdown]
# ## The same at home

# %%
home_losses = fit(home_logits, [home.prompts, home.deep], whole.score.weight, "home")
at_home = accuracy(home_logits)
apart = max(abs(one - other) for one, other in zip(losses, home_losses))
record.keep(f"accuracy tuned on the local model: {at_home:.3f}")
record.keep(f"largest difference between the two losses, over {NUM_STEPS} steps: {apart:.1e}")

# %% [markdown]
# ## What was trained is a small file

# %%
model.save_pretrained("tuned-sst2")
record.say("saved in tuned-sst2; from_pretrained of that folder goes on from here")
swarm.close()
record.write(options.result)
