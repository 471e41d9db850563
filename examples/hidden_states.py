"""Look at what flows between blocks, and take a path of your own through the model.

python examples/hidden_states.py MODEL ADDR
"""

import sys

import torch
from transformers import AutoTokenizer

from petals import AutoDistributedModelForCausalLM

name, address = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[address])
blocks = model.remote_blocks

ids = tokenizer("Petals are", return_tensors="pt")["input_ids"]
with torch.inference_mode():
    hidden = model.get_input_embeddings()(ids)
    half = len(blocks) // 2
    middle = blocks[:half](hidden)
    print(f"after {half} of {len(blocks)} blocks: {tuple(middle.shape)}, norm {middle.norm():.1f}")
    print(f"after all of them: norm {blocks[half:](middle).norm():.1f}")
