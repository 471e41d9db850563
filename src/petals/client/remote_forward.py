"""What a model's classes become when its blocks are on servers: each forward caught and checked.

The original forward of transformers then runs with `RemoteSequential` as its only layer. Must not
know routes, servers, files or decoding.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.client.adapters import AdaptedModel
from petals.client.block_runner import Session
from petals.client.padding import Layout, Rows, read_columns
from petals.client.remote_cache import RemoteCache
from petals.client.remote_sequential import ModelPass, RemoteSequential
from petals.errors import BadInput, NotSupported

_NEEDS_WHOLE_MODEL = {
    "output_hidden_states": "call slices of the blocks: model.remote_blocks[:5](hidden)",
    "output_attentions": "attention maps do not leave the servers; load the model locally",
    "output_router_logits": "router logits do not leave the servers; load the model locally",
}

_NORM_NAMES = ("ln_f", "norm", "final_layernorm", "final_layer_norm", "norm_f")

_OLD_NAMES: dict[str, Callable[[Any], Any]] = {
    "transformer": lambda model: model.base_model,
    "h": lambda model: model.remote_blocks,
    "word_embeddings": lambda model: model.get_input_embeddings(),
    "word_embeddings_layernorm": lambda model: nn.Identity(),
    "ln_f": lambda model: _last_norm(model.get_decoder()),
}
"""BLOOM's names, by which the original Petals' other families could be addressed too."""


class DistributedModel(AdaptedModel):
    """What every model with remote blocks can do, whatever its head."""

    blocks_path: str

    def __getattr__(self, name: str) -> Any:
        module: Any = super()
        try:
            return module.__getattr__(name)
        except AttributeError:
            if name not in _OLD_NAMES:
                raise
        return _OLD_NAMES[name](self)

    @property
    def remote_blocks(self: Any) -> RemoteSequential:
        """All blocks; the same object as ``model.transformer.h`` or ``model.model.layers``."""
        blocks: RemoteSequential = self.get_submodule(self.blocks_path)
        return blocks

    @property
    def active_session(self) -> Session | None:
        """The session opened by ``inference_session`` or ``use_session`` around this call."""
        return self.remote_blocks.active_session

    @property
    def position(self) -> int:
        return self.remote_blocks.position

    def use_session(self, session: Session | None) -> AbstractContextManager[Session | None]:
        """Continue ``session`` in all calls inside the ``with`` block."""
        return self.remote_blocks.use_session(session)

    def inference_session(
        self, *, max_length: int | None = None, num_rows: int | None = None
    ) -> AbstractContextManager[Session]:
        """A session of at most ``max_length`` tokens per row; calls inside continue it."""
        return self.remote_blocks.inference_session(max_length=max_length, num_rows=num_rows)


class RemoteForward(DistributedModel):
    """A model directly around the blocks: embeddings and norm here, blocks elsewhere."""

    config: PretrainedConfig

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original, in a session, with ``past_key_values``, or for whole sequences.

        Raises BadInput for ids outside the vocabulary, NotSupported for what only local blocks can
        give, before anything is sent.
        """
        original: Any = super()
        call = kwargs
        if args:
            call = dict(zip(inspect.signature(original.forward).parameters, args)) | kwargs
        if self.remote_blocks.is_in_pass:
            return original.forward(**call)
        self._refuse(call)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if ids is not None:
            check_token_ids(ids, self.get_input_embeddings())
        if (ids is None) == (embeds is None):
            raise BadInput("Give either input_ids or inputs_embeds.", hint="Exactly one of them.")
        given: Any = ids if ids is not None else embeds
        num_rows, num_columns = given.shape[:2]
        layout = Layout(
            num_columns=num_columns,
            attention_mask=call.get("attention_mask"),
            position_ids=call.get("position_ids"),
            follows_mask=_positions_follow_mask(self.config),
        )
        cache = self._cache_for(call)
        if cache is None:
            rows = read_columns(Rows.empty(num_rows), layout)
        else:
            rows = cache.read(num_rows, layout)
        call["past_key_values"], call["use_cache"] = cache, cache is not None
        with self.remote_blocks.model_pass(ModelPass(rows, cache)):
            return original.forward(**call)

    def _cache_for(self, call: dict[str, Any]) -> RemoteCache | None:
        given = call.get("past_key_values")
        if isinstance(given, RemoteCache):
            return given
        if given is not None:
            raise NotSupported(
                f"A {type(given).__name__} keeps keys and values here, "
                "but those of remote blocks stay on the servers.",
                hint="Call the model with use_cache=True and pass on what it returns, "
                "or work inside `with model.inference_session(max_length=...)`.",
            )
        session = self.active_session
        if session is not None:
            return RemoteCache.of(session)
        return self.remote_blocks.new_cache() if call.get("use_cache") else None

    def _refuse(self, call: dict[str, Any]) -> None:
        for name, instead in _NEEDS_WHOLE_MODEL.items():
            asked = call.get(name)
            if asked if asked is not None else getattr(self.config, name, False):
                raise NotSupported(
                    f"{name}=True needs the blocks here.", hint=f"Instead: {instead}."
                )
        for name in ("pixel_values", "pixel_values_videos", "input_features"):
            if call.get(name) is not None:
                raise NotSupported(
                    f"{name}: a client loads only the text side of a model.",
                    hint="Pass text only.",
                )


def check_token_ids(ids: Tensor, embeddings: nn.Module) -> None:
    """Raises BadInput unless ``ids`` is [batch, tokens >= 1] of integers inside the vocabulary."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise BadInput(
            f"Token ids are integers of shape [batch, tokens], not {ids.dtype} {tuple(ids.shape)}.",
            hint='Use tokenizer(text, return_tensors="pt")["input_ids"].',
        )
    if ids.numel() == 0:
        raise BadInput("The prompt is empty.", hint="Give at least one token, for example BOS.")
    vocabulary = getattr(embeddings, "num_embeddings", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        wrong = lowest if lowest < 0 else highest
        raise BadInput(
            f"Token id {wrong} is outside the vocabulary of {vocabulary} tokens.",
            hint="Use the tokenizer of this very model.",
        )


def _last_norm(decoder: nn.Module) -> nn.Module:
    named = dict(decoder.named_children())
    for name in _NORM_NAMES:
        if name in named:
            return named[name]
    raise AttributeError(f"{type(decoder).__name__} has no norm after its blocks")


def _positions_follow_mask(config: PretrainedConfig) -> bool:
    """Whether the model, given no positions, numbers tokens by the mask and not by column."""
    return config.model_type in ("bloom", "opt", "biogpt") or bool(getattr(config, "alibi", False))
