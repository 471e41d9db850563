"""Train a LoRA inside blocks that other people's machines hold; peft reads what comes out.

python examples/lora_adapter.py [--join ADDR] [--model NAME] [--short]
"""

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from tutorial import read_options, swarm_of

from petals import AutoDistributedModelForCausalLM, LoraConfig

options = read_options("A LoRA inside remote blocks")
num_steps = 2 if options.short else 20
tokenizer = AutoTokenizer.from_pretrained(options.model)
num_blocks = AutoConfig.from_pretrained(options.model).num_hidden_layers
ids = tokenizer("Our cat is called Bartholomew the Third.", return_tensors="pt")["input_ids"]
question = tokenizer("Our cat is called", return_tensors="pt")["input_ids"]

with swarm_of(options, num_blocks) as initial_peers:
    load = AutoDistributedModelForCausalLM.from_pretrained
    model = load(options.model, initial_peers=initial_peers, dtype=torch.float32)
    print("before:", tokenizer.decode(model.generate(question, max_new_tokens=8)[0]))
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} parameters are trained, all of them here")
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for step in range(num_steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    print("after: ", tokenizer.decode(model.generate(question, max_new_tokens=8)[0]))
    model.save_adapter("lora-of-the-cat")
    with torch.no_grad():
        remote = model(ids).logits

# The same adapter under the whole model, by stock peft.
whole = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
local = PeftModel.from_pretrained(whole, "lora-of-the-cat")
with torch.no_grad():
    apart = (local(ids).logits - remote).abs().max().item()
print(f"peft's logits differ from the swarm's by at most {apart:.1e}")
