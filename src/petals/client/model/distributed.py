"""What a model's classes become when its blocks are on servers: each forward caught and checked.

The original forward of transformers then runs with `RemoteSequential` as its only layer. Must not
know routes, servers, files or decoding.
"""

import contextlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.client.block_runner import SessionView
from petals.client.model.hidden_states import HiddenStates
from petals.client.model.padding import ColumnLayout, Rows, read_columns
from petals.client.model.remote_cache import RemoteCache
from petals.client.model.remote_sequential import ModelPass, RemoteSequential
from petals.client.tuning.lora import AdaptedModel
from petals.client.tuning.prompts import (
    DEEP_PROMPTS,
    PROMPTS,
    deep_prompts,
    num_prompt_tokens,
    with_prompts,
    without_prompts,
)
from petals.errors import BadInput, NotSupported
from petals.logs import get_logger

logger = get_logger(__name__)

_NEEDS_WHOLE_MODEL = {
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
    PROMPTS: lambda model: _own_module(model.blocks_host, PROMPTS),
    DEEP_PROMPTS: lambda model: _own_module(model.blocks_host, DEEP_PROMPTS),
}
"""BLOOM's names, by which the original Petals' other families could be addressed too."""


class DistributedModel(AdaptedModel):
    """What every model with remote blocks can do, whatever its head."""

    blocks_path: str
    host_path: str

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
    def blocks_host(self: Any) -> Any:
        """The innermost model around the blocks; a tuned model's prompts are its parameters."""
        return self.get_submodule(self.host_path)

    @property
    def num_prompt_tokens(self) -> int:
        """Trained prompts before each sequence; 0 unless loaded with a ``tuning_mode``."""
        return num_prompt_tokens(self.blocks_host)

    @property
    def active_session(self) -> SessionView | None:
        """The session opened by ``inference_session`` or ``use_session`` around this call."""
        return self.remote_blocks.active_session

    @property
    def position(self) -> int:
        return self.remote_blocks.position

    def use_session(
        self, session: SessionView | None
    ) -> AbstractContextManager[SessionView | None]:
        """Continue ``session`` in all calls inside the ``with`` block."""
        return self.remote_blocks.use_session(session)

    def inference_session(
        self,
        *,
        max_length: int | None = None,
        num_rows: int | None = None,
    ) -> AbstractContextManager[SessionView]:
        """A session of at most ``max_length`` tokens per row; calls inside continue it.

        A tuned model's prompts, as they are now, come on top of that length; ``position`` counts
        them.
        """
        if max_length is not None:
            max_length += self.num_prompt_tokens
        return self.remote_blocks.inference_session(
            max_length=max_length, num_rows=num_rows, prompts=self._deep_prompts()
        )

    def new_cache(self) -> RemoteCache:
        """``past_key_values`` for a batch to come, with a session of its own."""

        def open_session(num_rows: int, max_length: int | None) -> SessionView:
            return self.remote_blocks.open_session(
                max_length=max_length, num_rows=num_rows, prompts=self._deep_prompts()
            )

        return RemoteCache(open_session, num_prompt_tokens=self.num_prompt_tokens)

    def cache_of(self, session: SessionView) -> RemoteCache:
        """``past_key_values`` that continue ``session``."""
        return RemoteCache.of(session, self.num_prompt_tokens)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Accepted, and needs nothing: no activation of a block is kept in this process."""
        logger.info("gradient checkpointing changes nothing here: the servers see to it themselves")

    def gradient_checkpointing_disable(self) -> None:
        """The other half of ``gradient_checkpointing_enable``."""

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _deep_prompts(self) -> Tensor | None:
        return deep_prompts(self.blocks_host, len(self.remote_blocks))


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
        cache = self._cache_for(call)
        num_past = 0 if cache is None else cache.num_columns
        call, num_new = with_prompts(self.blocks_host, call, num_past)
        rows = self._read(call, cache)
        call["past_key_values"], call["use_cache"] = cache, cache is not None
        deep = None if cache is not None else self._deep_prompts()
        prompts = None if deep is None else deep[:, None]
        shown = contextlib.nullcontext() if cache is None else cache.shown_whole()
        states = self._asked_states(call, cache)
        current = ModelPass(rows, cache, prompts, dict.fromkeys(states.taps if states else ()))
        is_tuple = call.get("return_dict", self.config.return_dict) is False
        if states is not None:
            call |= {"output_hidden_states": False, "return_dict": True}
        with self.remote_blocks.model_pass(current), shown:
            output = original.forward(**call)
        if states is not None:
            output = states.joined_to(output, current.tapped)
            output = output.to_tuple() if is_tuple else output
        return without_prompts(output, num_new, rows.num_columns)

    def _asked_states(
        self: Any, call: dict[str, Any], cache: RemoteCache | None
    ) -> HiddenStates | None:
        states = HiddenStates.asked_by(call, self.config, len(self.remote_blocks))
        if states is not None and cache is not None:
            raise NotSupported(
                "output_hidden_states: a session's servers give only what the last block puts out.",
                hint="Run whole sequences, outside a session and without use_cache=True; of a text "
                "that was generated, run model(ids, output_hidden_states=True) afterwards.",
            )
        return states

    def _read(self, call: dict[str, Any], cache: RemoteCache | None) -> Rows:
        """Where the new tokens of a checked call are."""
        ids = call.get("input_ids")
        given: Any = ids if ids is not None else call["inputs_embeds"]
        num_rows, num_columns = given.shape[:2]
        layout = ColumnLayout(
            num_columns=num_columns,
            attention_mask=call.get("attention_mask"),
            position_ids=call.get("position_ids"),
            follows_mask=self.num_prompt_tokens > 0 or _positions_follow_mask(self.config),
        )
        if cache is None:
            return read_columns(Rows.empty(num_rows), layout)
        return cache.read(num_rows, layout)

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
            return self.cache_of(session)
        return self.new_cache() if call.get("use_cache") else None

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


def _own_module(module: nn.Module, name: str) -> nn.Module:
    found = module._modules.get(name)
    if found is None:
        raise AttributeError(f"This model is not tuned; it has no {name}")
    return found


def _last_norm(decoder: nn.Module) -> nn.Module:
    named = dict(decoder.named_children())
    for name in _NORM_NAMES:
        if name in named:
            return named[name]
    raise AttributeError(f"{type(decoder).__name__} has no norm after its blocks")


def _positions_follow_mask(config: PretrainedConfig) -> bool:
    """Whether the model, given no positions, numbers tokens by the mask and not by column."""
    return config.model_type in ("bloom", "opt", "biogpt") or bool(getattr(config, "alibi", False))
