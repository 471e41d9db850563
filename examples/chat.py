"""Ask a model that a swarm serves one question and stream the answer.

python examples/chat.py MODEL ADDR
"""

import sys

from transformers import AutoTokenizer, TextStreamer

from petals import AutoDistributedModelForCausalLM

name, address = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[address])

chat = [{"role": "user", "content": "Name three planets."}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(**inputs, max_new_tokens=32, streamer=TextStreamer(tokenizer, skip_prompt=True))
