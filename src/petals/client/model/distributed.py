"""What a model's classes become when its blocks are on servers.

Each forward is intercepted and checked; then the original forward of transformers runs with one
`ModelPass` as its only layer. Knows no routes, servers, files or decoding.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from petals.client.model.hidden_states import ENTRY, HiddenStates
from petals.client.model.inference_session import InferenceSession, Recording
from petals.client.model.padding import ColumnLayout, Rows, positions_follow_mask, read_columns
from petals.client.model.remote_sequential import ModelPass, RemoteSequential
from petals.client.model.session_cache import SessionCache, name_cache
from petals.client.tuning import lora
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
from petals.models.checkpoint.arch import CACHE_ARGUMENT
from petals.models.loading.head import HeadKind
from petals.models.runtime.rotary import dynamic_rope_limit

logger = get_logger(__name__)

# The classes below are put before a class of transformers (`load.distributed_class`). At run time
# they do not derive from PreTrainedModel, because that would give every subclass its config class.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Extended
else:
    _Extended = object

_NEEDS_WHOLE_MODEL = {
    "output_attentions": "attention maps do not leave the servers; load the model locally",
    "output_router_logits": "router logits do not leave the servers; load the model locally",
}

_OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features")

_NORM_NAMES = ("ln_f", "norm", "final_layernorm", "final_layer_norm", "norm_f")

_OLD_NAMES: dict[str, Callable[["DistributedModel"], nn.Module]] = {
    "transformer": lambda model: model.base_model,
    "h": lambda model: model.remote_blocks,
    "word_embeddings": lambda model: model.get_input_embeddings(),
    "word_embeddings_layernorm": lambda model: nn.Identity(),
    "ln_f": lambda model: _last_norm(model.get_decoder()),
    PROMPTS: lambda model: _own_module(model.blocks_host, PROMPTS),
    DEEP_PROMPTS: lambda model: _own_module(model.blocks_host, DEEP_PROMPTS),
}
"""BLOOM's names; in the original Petals they worked for other families, too."""


class DistributedModel(_Extended):
    """What every model with remote blocks can do, whatever its head."""

    kind: ClassVar[HeadKind] = HeadKind.SEQUENCE_CLASSIFICATION
    blocks_path: str
    """Where the blocks are, from this module."""
    host_path: str
    """Where the innermost model around the blocks is, from this module."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _OLD_NAMES:
                raise
        return _OLD_NAMES[name](self)

    @property
    def remote_blocks(self) -> RemoteSequential:
        """All blocks; the same object as ``model.transformer.h`` or ``model.model.layers``."""
        blocks: RemoteSequential = self.get_submodule(self.blocks_path)
        return blocks

    @property
    def blocks_host(self) -> PreTrainedModel:
        """The innermost model around the blocks; a tuned model's prompts are its parameters."""
        return self.get_submodule(self.host_path)

    @property
    def num_prompt_tokens(self) -> int:
        """Trained prompts before each sequence; 0 unless loaded with a ``tuning_mode``."""
        return num_prompt_tokens(self.blocks_host)

    # Sessions

    @property
    def active_session(self) -> InferenceSession | None:
        """The session opened by ``inference_session`` or ``use_session`` around this call."""
        return self.remote_blocks.active_session

    @property
    def position(self) -> int:
        """Tokens in the longest row of the active session, trained prompts included."""
        return self.remote_blocks.position

    def use_session(
        self, session: InferenceSession | None
    ) -> AbstractContextManager[InferenceSession | None]:
        """Continue ``session`` in all calls inside the ``with`` block; with None, no session."""
        return self.remote_blocks.use_session(session)

    @contextmanager
    def inference_session(
        self, *, max_length: int | None = None, num_rows: int | None = None
    ) -> Iterator[InferenceSession]:
        """A session of at most ``max_length`` tokens per row; calls inside continue it.

        A tuned model's prompts, as they are now, come on top of that length; ``position`` counts
        them.
        """
        with self._open_session(max_length, num_rows) as session, self.use_session(session):
            yield session

    def new_cache(self) -> SessionCache:
        """``past_key_values`` for a new batch, with a session of its own that grows."""
        return SessionCache(self._open_session)

    def own_cache(self, given: Cache) -> SessionCache:
        """``past_key_values`` that a caller passes, as a cache of this model: one of ours, or an
        empty one of transformers, which becomes one of ours. Raises NotSupported for another.
        """
        return SessionCache.adopted(given, self._open_session)

    def cache_of(self, session: InferenceSession) -> SessionCache:
        """``past_key_values`` that continue ``session``."""
        session.num_prompt_tokens = self.num_prompt_tokens
        return SessionCache.of(session)

    def _open_session(
        self, max_length: int | None = None, num_rows: int | None = None
    ) -> InferenceSession:
        if max_length is not None:
            max_length += self.num_prompt_tokens
        session = self.remote_blocks.open_session(
            max_length=max_length, num_rows=num_rows, prompts=self._deep_prompts()
        )
        session.num_prompt_tokens = self.num_prompt_tokens
        session.dynamic_rope_limit = dynamic_rope_limit(self.config)
        return session

    def _deep_prompts(self) -> Tensor | None:
        return deep_prompts(self.blocks_host, len(self.remote_blocks))

    # Training

    add_adapter = lora.add_adapter
    load_adapter = lora.load_adapter
    delete_adapter = lora.delete_adapter
    save_adapter = lora.save_adapter
    active_adapters = lora.active_adapters
    set_adapter = lora.set_adapter
    disable_adapters = enable_adapters = lora.not_with_remote_blocks(
        "disable_adapters and enable_adapters",
        "delete_adapter() goes back to the model without it; save_adapter(FOLDER) first keeps it.",
    )
    get_adapter_state_dict = lora.not_with_remote_blocks(
        "get_adapter_state_dict", "save_adapter(FOLDER) writes them in peft's format."
    )
    enable_peft_hotswap = lora.not_with_remote_blocks(
        "enable_peft_hotswap", "load_adapter(FOLDER) takes the place of the adapter before it."
    )

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, *args: object, **kwargs: object) -> None:
        """Accepted without effect: no activation of a block is kept in this process."""
        logger.info("gradient checkpointing changes nothing here: the servers decide about it")

    def gradient_checkpointing_disable(self) -> None:
        """Accepted without effect, as ``gradient_checkpointing_enable``."""

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable


class GeneratingModel(DistributedModel):
    """What `generate` of transformers calls before its first forward, and before each."""

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: object,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Open a session of the length this generation needs; a draft's grows with its rounds."""
        cache = model_kwargs.get(CACHE_ARGUMENT)
        if cache is not None:
            cache = self.own_cache(cache)
        elif generation_config.use_cache is not False:
            cache = model_kwargs[CACHE_ARGUMENT] = self.new_cache()
        if isinstance(cache, SessionCache) and not generation_config.is_assistant:
            cache.open(max_cache_length)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Remove the tokens that have run already, also where transformers does not.

        It does not where it verifies a first draft. A mask as long as the ids says that the ids
        begin with the cache's, and not only continue them. Where rope factors change (Phi-3) and
        all ids have to run again, the rows of the same session begin anew.
        """
        cache, mask = kwargs.get(CACHE_ARGUMENT), kwargs.get("attention_mask")
        if isinstance(cache, SessionCache):
            if self._crosses_rope_limit(cache, input_ids, mask):
                cache.begin_anew()
                next_sequence_length = None
            num_past, num_columns = cache.get_seq_length(), input_ids.shape[1]
            begins_with_past = mask is None or mask.shape[1] == num_columns
            if next_sequence_length is None and begins_with_past and 0 < num_past < num_columns:
                next_sequence_length = num_columns - num_past
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs
        )
        if isinstance(cache, SessionCache) and inputs.get(CACHE_ARGUMENT) is None:
            cache.begin_anew()
            inputs[CACHE_ARGUMENT] = cache
        return inputs

    def _crosses_rope_limit(self, cache: SessionCache, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether the keys of a row have the factors of the other side of the limit, so that they
        have to be computed again: the row grows past it, or was past it and has been cut.

        transformers looks at the columns of the whole batch. Here a row is what it would be alone,
        so its own tokens count, also those of trained prompts.
        """
        limit = getattr(self.config, "original_max_position_embeddings", None)
        prepare = super().prepare_inputs_for_generation
        if limit is None or prepare.__func__ is GenerationMixin.prepare_inputs_for_generation:
            return False
        past = cache.visible
        num_prompts = max(cache.columns.lengths, default=0) - max(past.lengths, default=0)
        lengths = [ids.shape[1]] * past.num_rows
        if mask is not None and mask.shape == ids.shape:
            lengths = mask.sum(1).tolist()
        return any(
            before > 0 and (longest > limit) != (after > limit - num_prompts)
            for before, after, longest in zip(past.lengths, lengths, cache.longest_since_empty)
        )


class DistributedBaseModel(DistributedModel):
    """A model directly around the blocks: embeddings and norm here, blocks on servers."""

    kind = HeadKind.BASE

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput | tuple[Tensor, ...]:
        """As the original, in a session, with ``past_key_values``, or for whole sequences.

        Raises BadInput for ids outside the vocabulary and NotSupported for what needs local blocks,
        before anything is sent.
        """
        original, call = super().forward, name_cache(kwargs)
        if args:
            call = dict(zip(inspect.signature(original).parameters, args)) | call
        if self.remote_blocks.is_in_pass:  # the model around it calls, and has checked
            return original(**call)
        self._check(call)
        cache = self._cache_for(call)
        session = None if cache is None else self._session_of(cache, call)
        past = Rows.empty(0) if session is None else session.columns
        num_prompts = self.num_prompt_tokens if session is None else session.num_prompt_tokens
        num_new_prompts = max(0, num_prompts - past.num_columns)
        if num_prompts:
            call = with_prompts(self.blocks_host, call, past.num_columns)
        rows = read_columns(past, self._layout(call, num_prompts))
        call[CACHE_ARGUMENT], call["use_cache"] = cache, cache is not None
        is_tuple = call.get("return_dict", self.config.return_dict) is False
        states = self._hidden_states(call, session)
        if states is not None:
            call |= {"output_hidden_states": False, "return_dict": True}
        current = self._pass(rows, session, states)
        if cache is not None and session is None:
            current.tapped[ENTRY] = None  # to be recorded
        shown = contextlib.nullcontext() if cache is None else cache.shown_whole()
        with self.remote_blocks.entered(current), shown:
            output = original(**call)
        if cache is not None and session is None:
            cache.record(Recording.of_forward(_recorded(current), rows, num_prompts))
        if states is not None:
            output = states.joined_to(output, {tap: current.tapped[tap] for tap in states.taps})
            output = output.to_tuple() if is_tuple else output
        if num_new_prompts:
            output = without_prompts(output, num_new_prompts, rows.num_columns)
        return output

    def _pass(
        self, rows: Rows, session: InferenceSession | None, states: HiddenStates | None
    ) -> ModelPass:
        # A session was opened with its deep prompts; whole sequences bring theirs.
        deep = None if session is not None else self._deep_prompts()
        prompts = None if deep is None else deep[:, None]
        tapped = dict.fromkeys(states.taps if states is not None else ())
        return ModelPass(self.remote_blocks, rows, session, prompts, tapped)

    def _hidden_states(
        self, call: dict[str, Any], session: InferenceSession | None
    ) -> HiddenStates | None:
        asked = self._option(call, "output_hidden_states")
        if not asked:  # a bare 0 asks for nothing, as in transformers
            return None
        if session is not None:
            raise NotSupported(
                "output_hidden_states: a session's servers return the last block's output only.",
                hint="Run whole sequences, outside a session; of a text that was generated, "
                "run model(ids, output_hidden_states=True) afterwards.",
            )
        return HiddenStates.of(asked, len(self.remote_blocks))

    def _layout(self, call: dict[str, Any], num_prompts: int) -> ColumnLayout:
        ids = call.get("input_ids")
        num_rows, num_columns = (ids if ids is not None else call["inputs_embeds"]).shape[:2]
        return ColumnLayout(
            num_rows=num_rows,
            num_columns=num_columns,
            attention_mask=call.get("attention_mask"),
            position_ids=call.get("position_ids"),
            follows_mask=num_prompts > 0 or positions_follow_mask(self.config),
        )

    def _cache_for(self, call: dict[str, Any]) -> SessionCache | None:
        """The cache that the call names, that its session has, or that is to be returned; None
        without any.
        """
        if call.get(CACHE_ARGUMENT) is not None:
            return self.own_cache(call[CACHE_ARGUMENT])
        session = self.remote_blocks.session_of_call()
        if session is not None:
            return self.cache_of(session)
        return self.new_cache() if self._option(call, "use_cache") else None

    def _session_of(self, cache: SessionCache, call: dict[str, Any]) -> InferenceSession | None:
        """The session in which a call runs; None: it runs whole sequences, which ``cache`` records.

        A session is opened at once only if the caller says that the cache will be continued. Most
        caches that a model returns by default are dropped, and a session gives no gradients and no
        hidden states.
        """
        if cache.is_open or cache.columns.num_columns:
            return cache.open()
        is_wanted = call.get("use_cache") or call.get(CACHE_ARGUMENT) is not None
        if not is_wanted or self._option(call, "output_hidden_states") or self._learns(call):
            return None
        return cache.open()

    def _learns(self, call: dict[str, Any]) -> bool:
        """Whether a call may be asked for gradients."""
        given = call.get("inputs_embeds")
        is_trained = given is not None and given.requires_grad
        has_trained = any(parameter.requires_grad for parameter in self.parameters())
        return torch.is_grad_enabled() and (is_trained or has_trained)

    def _check(self, call: dict[str, Any]) -> None:
        for name, instead in _NEEDS_WHOLE_MODEL.items():
            if self._option(call, name):
                raise NotSupported(
                    f"{name}=True needs the blocks here.", hint=f"Instead: {instead}."
                )
        for name in _OTHER_INPUTS:
            if call.get(name) is not None:
                raise NotSupported(
                    f"{name}: a client loads only the text side of a model.",
                    hint="Pass text only.",
                )
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if ids is not None:
            check_token_ids(ids, self.get_input_embeddings())
        if (ids is None) == (embeds is None):
            raise BadInput("Give either input_ids or inputs_embeds.", hint="Exactly one of them.")

    def _option(self, call: dict[str, Any], name: str) -> Any:
        """A flag of the call, else of the config; False if neither has it."""
        given = call.get(name)
        return given if given is not None else getattr(self.config, name, False)


def with_signature_of(original: Callable[..., Any], method: Callable[..., Any]) -> Any:
    """``method`` with the signature that transformers reads to learn what a model accepts."""

    @functools.wraps(original)
    def wrapper(self: DistributedModel, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return wrapper


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


def _recorded(done: ModelPass) -> Tensor:
    """What entered the first block in a pass that taps it."""
    entered = done.tapped[ENTRY]
    assert entered is not None
    return entered.detach()


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
