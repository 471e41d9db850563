"""Adapters made by stock peft, with random matrices, and their effect on a local model."""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from petals.models.checkpoint.arch import describe

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj"],
    "mixtral": ["q_proj", "o_proj"],
}


def peft_model(folder: Path, seed: int = 0, **settings) -> peft.PeftModel:
    """The model in ``folder`` with a new adapter; B is random, too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings
    settings.setdefault("target_modules", TARGETS[model.config.model_type])
    settings.setdefault("fan_in_fan_out", model.config.model_type == "gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
    return adapted.eval()


def save_adapter(folder: Path, target: Path, seed: int = 0, **settings) -> Path:
    """A folder as peft's save_pretrained writes it."""
    peft_model(folder, seed, **settings).save_pretrained(target)
    return target


def layers_of(model) -> torch.nn.ModuleList:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return inner.base_model.get_submodule(describe(inner.config).layers_path)


def through_blocks(model, ids: torch.Tensor, first: int = 0, last: int | None = None):
    """(states entering block ``first``, states after block ``last``), [n, H] each."""
    layers, seen = layers_of(model), []

    def enter(layer, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(layer, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        layers[first].register_forward_pre_hook(enter, with_kwargs=True),
        layers[len(layers) - 1 if last is None else last].register_forward_hook(leave),
    ]
    try:
        model(input_ids=ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return seen[0][0], seen[1][0]


def token_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))
