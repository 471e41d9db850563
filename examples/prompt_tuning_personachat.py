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
# # A chatbot with a persona: prompts trained through a swarm
#
# The model learns to answer as somebody: here as a machine that knows it is one, from short
# dialogues that stand in for PersonaChat. Prompts before the input and inside the blocks
# (`deep_ptune`) are trained here; the blocks stay on servers, frozen. Then it is talked to, through
# a session, word by word.
#
# As a script: `python examples/prompt_tuning_personachat.py` (about ten minutes on two cores),
# `--short` for a minute's look, `--result FILE` to keep the numbers and the dialogues.

# %%
from contextlib import ExitStack

import torch
from transformers import AutoConfig, AutoTokenizer, TextStreamer
from tutorial import Record, chart, load_dialogues, read_options, swarm_of

from petals import AutoDistributedModelForCausalLM

options = read_options("A chatbot with a persona: prompts trained through a swarm")
record = Record("A chatbot with a persona, deep prompt tuning through a swarm")
NUM_STEPS, BATCH, NUM_TEST, NUM_NEW = (2, 2, 2, 4) if options.short else (40, 8, 32, 24)
NUM_PROMPTS, MAX_TOKENS, RATE = 8, 64, 5e-3

# %% [markdown]
# ## Dialogues
#
# Every pair is a chat of one turn. Only the answer counts: elsewhere the label is -100.

# %%
pairs = load_dialogues(options.data)
test, train = pairs[:NUM_TEST], pairs[NUM_TEST:]
record.keep(f"{len(train)} dialogues to train on, {len(test)} held out")
tokenizer = AutoTokenizer.from_pretrained(options.model)


def ask(question: str) -> torch.Tensor:
    chat = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def encode(pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    question = ask(pair[0])[0].tolist()
    answer = tokenizer.encode(pair[1] + "<|im_end|>", add_special_tokens=False)
    ids = (question + answer)[:MAX_TOKENS]
    return ids, ([-100] * len(question) + answer)[:MAX_TOKENS]


def batch(pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    rows = [encode(pair) for pair in pairs]
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
        ),
        "labels": torch.tensor([marks + [-100] * (longest - len(marks)) for _, marks in rows]),
    }


# %% [markdown]
# ## The model, its blocks in a swarm

# %%
swarm = ExitStack()
num_blocks = AutoConfig.from_pretrained(options.model).num_hidden_layers
initial_peers = swarm.enter_context(swarm_of(options, num_blocks))
load = AutoDistributedModelForCausalLM.from_pretrained
untuned = load(options.model, initial_peers=initial_peers, dtype=torch.float32)
model = load(
    options.model,
    initial_peers=initial_peers,
    tuning_mode="deep_ptune",
    pre_seq_len=NUM_PROMPTS,
    dtype=torch.float32,
)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    groups = [test[first : first + BATCH] for first in range(0, len(test), BATCH)]
    return sum(model(**batch(group)).loss.item() for group in groups) / len(groups)


def talk(model: torch.nn.Module, questions: list[str]) -> str:
    """One session for the whole conversation; the words come as they are made."""
    said = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with model.inference_session(max_length=512):
        for question in questions:
            print(f"> {question}", flush=True)
            words = model.generate(
                ask(question), max_new_tokens=NUM_NEW, do_sample=False, streamer=streamer
            )
            answer = tokenizer.decode(words[0, ask(question).shape[1] :], skip_special_tokens=True)
            said.append(f"> {question}\n{answer.strip()}")
    return "\n".join(said)


QUESTIONS = ["Are you ever sad?", "What do you eat?", "Who are you?"]
record.keep(f"loss on held-out answers, untuned: {held_out_loss(untuned):.3f}")
record.block(talk(untuned, QUESTIONS))

# %% [markdown]
# ## Training

# %%
trained = [p for p in model.parameters() if p.requires_grad]
record.keep(f"{sum(p.numel() for p in trained):,} parameters are trained, all of them here")
optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
losses = []
for step in range(NUM_STEPS):
    first = step * BATCH % (len(train) - BATCH)
    loss = model(**batch(train[first : first + BATCH])).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    record.say(f"step {step + 1} of {NUM_STEPS}, loss {losses[-1]:.4f}")

# %%
record.block(chart(losses))

# %% [markdown]
# ## The same questions again

# %%
record.keep(f"loss on held-out answers, tuned: {held_out_loss(model):.3f}")
record.block(talk(model, QUESTIONS))
model.save_pretrained("tuned-persona")
record.say("saved in tuned-persona; from_pretrained of that folder goes on from here")
swarm.close()
record.write(options.result)
