"""Drafting with a small local model: speculative generation of the original Petals.

The small model proposes tokens and one step through the swarm verifies all of them; the text is the
large model's own. Decoding is transformers' assisted generation.
"""

from transformers import PreTrainedModel

from petals.errors import ConfigError


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
    # Not as a submodule: it must not show among the parameters and be saved with the model.
    model.__dict__["small_model"] = small_model
    return model


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
