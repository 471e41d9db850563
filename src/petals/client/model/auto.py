"""The classes that users load models with; they find the architecture from the config.

Contain no behaviour: loading is in `load`, everything else in the classes that it makes.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel

from petals.client.model.generation import draft_with
from petals.client.model.load import LoadRequest, attach, load_pretrained, open_model
from petals.errors import ConfigError
from petals.models.loading.head import HeadKind


class AutoDistributedConfig:
    """The config of a model, with the client's settings as attributes."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> PretrainedConfig:
        """Read a model's config. ``options``: fields of ClientConfig, and of the config itself.

        Raises ModelNotFound, ModelNotSupported, ConfigError.
        """
        request = LoadRequest.read(options)
        checkpoint, client = open_model(str(model_name_or_path), request)
        attach(checkpoint.config, client, request.tuning)
        return checkpoint.config


class AutoDistributedModel:
    """A base model (hidden states out) whose blocks stay on servers."""

    _kind: ClassVar[HeadKind] = HeadKind.BASE

    def __init__(self) -> None:
        raise ConfigError(
            f"{type(self).__name__} is not made directly.",
            hint=f"Use {type(self).__name__}.from_pretrained(NAME, initial_peers=[...]).",
        )

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> PreTrainedModel:
        """Load embeddings and head of a hub repository or local folder; its blocks are not read.

        ``options``: any field of ClientConfig (``initial_peers``, ``swarm_key``, ...) and of
        TuningConfig (``tuning_mode``, ``pre_seq_len``: prompts to train), ``dtype``
        (or ``torch_dtype``; default: the checkpoint's), ``revision``, ``token``, ``cache_dir``,
        ``use_chunked_forward``, ``chunked_forward_step``, ``config`` (an AutoDistributedConfig's,
        for its client settings), and fields of the model's config. Sends nothing to the swarm.
        Raises ModelNotFound, ModelNotSupported, PickleCheckpointRefused, ModelFilesBroken,
        NotEnoughDisk, ConfigError.
        """
        return load_pretrained(str(model_name_or_path), cls._kind, options)


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """A language model that generates through the swarm."""

    _kind = HeadKind.CAUSAL_LM


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """A classifier on top of blocks on servers."""

    _kind = HeadKind.SEQUENCE_CLASSIFICATION


class AutoDistributedSpeculativeModel(AutoDistributedModelForCausalLM):
    """A language model whose tokens a small local model drafts and the swarm verifies."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **options: Any) -> PreTrainedModel:
        """As AutoDistributedModelForCausalLM; ``small_model`` is a local one of its vocabulary."""
        small_model = options.pop("small_model", None)
        return draft_with(super().from_pretrained(model_name_or_path, **options), small_model)
