"""Take a path of your own through a model: skip blocks, mix two ways, add a vector, get gradients.

python examples/custom_path.py [--join ADDR] [--model NAME] [--short]
"""

import torch
from transformers import AutoConfig, AutoTokenizer
from tutorial import read_options, swarm_of

from petals import AutoDistributedModelForCausalLM

options = read_options("Paths of one's own through a model in a swarm")
num_steps = 1 if options.short else 10
tokenizer = AutoTokenizer.from_pretrained(options.model)
num_blocks = AutoConfig.from_pretrained(options.model).num_hidden_layers

with swarm_of(options, num_blocks) as initial_peers:
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model, initial_peers=initial_peers, dtype=torch.float32
    )
    blocks, half = model.remote_blocks, num_blocks // 2
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    hidden = model.get_input_embeddings()(ids)

    def next_words(states: torch.Tensor) -> str:
        logits = model.lm_head(model.model.norm(states))[0, -1]
        return ", ".join(repr(tokenizer.decode(token)) for token in logits.topk(3).indices)

    with torch.no_grad():
        print("all blocks:          ", next_words(blocks(hidden)))
        print("without the last two:", next_words(blocks[:-2](hidden)))
        middle = blocks[:half](hidden)
        skipped = blocks[half + 2 :](middle)
        print(f"without {half} and {half + 1}:    ", next_words(skipped))
        long, short = blocks[half : half + 4](middle), blocks[half + 2 : half + 4](middle)
        print("two ways, averaged:  ", next_words(blocks[half + 4 :]((long + short) / 2)))

    # A vector, added in the middle to every token, is trained to make another word likely.
    wanted = tokenizer.encode(" Berlin", add_special_tokens=False)[0]
    vector = torch.zeros(hidden.shape[-1], requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=0.3)
    for step in range(num_steps):
        states = blocks[half:](middle + vector)
        logits = model.lm_head(model.model.norm(states))[0, -1]
        loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([wanted]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}, next words {next_words(states.detach())}")
