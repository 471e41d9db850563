"""Prompt tuning by hand: a stock model of transformers, with prompts put in through hooks.

Nothing of Petals is used, so that it can be the reference for Petals.
"""

from contextlib import contextmanager

import torch


class TunedReference:
    """``model`` with P prompts before its embeddings and, if given, others added in its layers.

    prompts: [P, E]; deep: [layers, P, H] or None. Both are leaves of their own, with gradients.
    """

    def __init__(self, model, layers, prompts, deep=None):
        self.model = model.requires_grad_(False)
        self.layers = layers
        self.prompts = prompts.detach().clone().requires_grad_()
        self.deep = None if deep is None else deep.detach().clone().requires_grad_()

    @classmethod
    def of(cls, local, remote):
        """The prompts of a tuned model, put into the whole model."""
        host = remote.blocks_host
        num_blocks = len(remote.remote_blocks)
        deep = host._modules.get("intermediate_prompt_embeddings")
        layers = local.get_submodule(remote.blocks_path)
        if deep is not None:
            weight = deep.weight.detach()
            deep = weight.view(len(weight), num_blocks, -1).transpose(0, 1)
        return cls(local, layers, host.prompt_embeddings.weight, deep)

    @property
    def leaves(self):
        return [self.prompts] if self.deep is None else [self.prompts, self.deep]

    def gradients(self):
        """Gradients of the prompts, in the shapes of the tuned model's parameters."""
        found = [self.prompts.grad]
        if self.deep is not None:
            found.append(self.deep.grad.transpose(0, 1).reshape(len(self.prompts), -1))
        return found

    def embed(self, ids):
        embeds = self.model.get_input_embeddings()(ids)
        return torch.cat([self.prompts.to(embeds).expand(len(ids), -1, -1), embeds], dim=1)

    def states(self, ids):
        """The base model's output for ids [rows, T] without padding: [rows, T, H]."""
        with self.deep_prompts():
            output = self.model.base_model(inputs_embeds=self.embed(ids), use_cache=False)
        return output.last_hidden_state[:, len(self.prompts) :]

    def logits(self, ids):
        with self.deep_prompts():
            output = self.model(inputs_embeds=self.embed(ids), use_cache=False)
        return output.logits[:, len(self.prompts) :]

    def generate(self, ids, **options):
        """Prompt and new tokens, as `generate` gives them for token ids."""
        with self.deep_prompts(), torch.no_grad():
            embeds = self.embed(ids)
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
            new = self.model.generate(
                inputs_embeds=embeds, attention_mask=mask, use_cache=True, **options
            )
        return torch.cat([ids.repeat_interleave(len(new) // len(ids), dim=0), new], dim=1)

    @contextmanager
    def deep_prompts(self):
        """Add deep prompts to whole sequences and to the first step of a generation."""

        def add(number):
            def hook(layer, args, kwargs):
                states = args[0] if args else kwargs["hidden_states"]
                if states.shape[1] > 1:
                    prompt = self.deep[number].to(states)
                    first, rest = states[:, : len(prompt)] + prompt, states[:, len(prompt) :]
                    states = torch.cat([first, rest], dim=1)
                if args:
                    return (states, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": states}

            return hook

        handles = [
            layer.register_forward_pre_hook(add(number), with_kwargs=True)
            for number, layer in enumerate(self.layers if self.deep is not None else ())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
