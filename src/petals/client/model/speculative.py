"""Drafting with a small model: what old scripts call speculative generation, on assisted decoding.

The small model proposes tokens, one trip through the swarm verifies them all; the text is the large
model's own. Must not know routes, and holds no decoding of its own.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from petals.errors import ConfigError


class SpeculativeGeneration:
    """Mixin over a distributed language model with a ``small_model``."""

    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `generate`, with ``small_model`` drafting unless told otherwise."""
        if kwargs.get("prompt_lookup_num_tokens") is None:
            kwargs.setdefault("assistant_model", self.small_model)
        alone: Any = super()
        return alone.generate(inputs, *args, **kwargs)


def draft_with(model: PreTrainedModel, small_model: PreTrainedModel) -> PreTrainedModel:
    """Let ``small_model`` draft in every `generate` of ``model``.

    Raises ConfigError for a model that cannot generate or has another vocabulary.
    """
    if not isinstance(small_model, PreTrainedModel) or not small_model.can_generate():
        raise ConfigError(
            "small_model must be a language model of transformers.",
            hint="Load one with AutoModelForCausalLM.from_pretrained(...).",
        )
    here, there = _vocabulary(model), _vocabulary(small_model)
    if here != there:
        raise ConfigError(
            f"The small model has {there} token ids, the large one {here}: different tokenizers.",
            hint="Draft with a smaller model of the same family.",
        )
    model.__class__ = speculative_class(type(model))
    # Not as a submodule: it must not show among the parameters and be saved with the model.
    model.__dict__["small_model"] = small_model
    return model


def speculative_class(distributed: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models that draft; a subclass of ``distributed`` with the same name."""
    if distributed not in _classes:
        names = {"__module__": __name__, "__doc__": distributed.__doc__}
        bases = (SpeculativeGeneration, distributed)
        _classes[distributed] = type(distributed.__name__, bases, names)
    return _classes[distributed]


_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
