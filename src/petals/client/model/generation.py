"""`generate` on remote blocks: all modes of transformers, in a session of the length they need.

Prepares the call (sessions, continuing without input, padding on the right) and passes it to the
`generate` of transformers. A call that fails leaves its session where it stood. Contains no
decoding and knows no routes or servers.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import ModelOutput

from petals.client.model.distributed import GeneratingModel, check_token_ids
from petals.client.model.generation_call import (
    LOCAL_OPTIONS,
    GenerationCall,
    Prompt,
    check_can_start,
    check_continues,
    mask_from_padding,
    refuse_modes,
)
from petals.client.model.inference_session import InferenceSession
from petals.client.model.padding import reorder_columns, to_left_padding
from petals.client.model.session_cache import SessionCache
from petals.errors import BadInput, ConfigError, NotSupported
from petals.logs import get_logger
from petals.models.checkpoint.arch import CACHE_ARGUMENT
from petals.models.loading.head import HeadKind

logger = get_logger(__name__)

_PER_COLUMN = ("inputs_embeds", "position_ids", "token_type_ids")
"""Arguments of `generate` that have, like the mask, a value for each column of the prompt."""


class _InItsSession:
    """A method that continues the session in whose `with` block it was looked up.

    ``Thread(target=model.generate)`` and ``executor.submit(model.generate, ids)`` look the method
    up inside the block and call it in a thread that does not inherit the block.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __get__(self, model: "DistributedCausalLM | None", owner: type | None = None) -> Any:
        bound = self._method.__get__(model, owner)
        session = None if model is None else model.active_session
        return bound if session is None else functools.partial(_call_within, bound, session)


def _call_within(
    bound: Callable[..., Any], active: InferenceSession, /, *args: Any, **kwargs: Any
) -> Any:
    model = bound.__self__  # type: ignore[attr-defined]
    if model.remote_blocks.is_in_block:
        return bound(*args, **kwargs)
    with model.use_session(active):
        return bound(*args, **kwargs)


class DistributedCausalLM(GeneratingModel):
    """A causal language model whose `generate` runs through the swarm."""

    kind = HeadKind.CAUSAL_LM
    small_model: PreTrainedModel | None = None
    """A local model that drafts in every `generate` of this one."""

    @_InItsSession
    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Token ids [batch, prompt + new] int64, or a ModelOutput, as transformers returns them.

        ``session`` (or the active one) is continued: its earlier tokens come before ``inputs``,
        which may be None, and only ``inputs`` and the new tokens are returned. ``inputs`` that
        begin with all ids of the session are the whole text: only what follows is run. Without a
        session one is opened for the call, of the length it needs, and closed after it, also on an
        error. Rows padded on the right run as if padded on the left: each continues its own last
        token.

        A call that raises leaves its session where it stood. The error, whatever it is, has the ids
        up to then as ``generated``, in the shape of the result (None if the call was refused), and
        the streamer is ended. Raises BadInput (empty prompt, ids outside the vocabulary),
        NotSupported (modes whose code is on the hub, options that need local blocks, a call from
        another thread than that of an open session), LengthExceeded and the errors of the swarm.
        """
        if self.small_model is not None and kwargs.get("prompt_lookup_num_tokens") is None:
            kwargs.setdefault("assistant_model", self.small_model)
        call = GenerationCall(self, args, kwargs | {"inputs": inputs})
        with call:
            if call.is_assistant:
                return self._run(call.inputs, call)
            refuse_modes(call)
            if session is None and call.kwargs.get(CACHE_ARGUMENT) is None:
                session = self.remote_blocks.session_of_call()
            return self._generate(call, session)

    def _generate(
        self, call: GenerationCall, session: InferenceSession | None
    ) -> Tensor | ModelOutput:
        kwargs = call.kwargs
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        if cache is not None:
            check_continues(cache, call)
            return self._decode(call.inputs, cache, call)
        prompt = self._read_prompt(call)
        if session is not None:
            with session.in_use:
                return self._continue(session, prompt, call)
        if prompt is None:
            check_can_start(call)
        elif prompt.mask is not None:
            kwargs["attention_mask"] = prompt.mask
        call.shown = _shown(prompt, 0)
        ids = None if prompt is None else prompt.ids
        if call.get("use_cache") is False:
            return _map_sequences(self._decode(ids, None, call), call.shown)
        with SessionCache(self._open_session, grows=False) as cache:
            result = _map_sequences(self._decode(ids, cache, call), call.shown)
            if isinstance(result, ModelOutput):
                cache.park()  # the result holds it, and may be continued or dropped
            return result

    def _decode(
        self, ids: Tensor | None, cache: object | None, call: GenerationCall
    ) -> Tensor | ModelOutput:
        """transformers' own `generate`, continuing ``cache``."""
        call.begin(ids)
        if cache is not None:
            call.kwargs[CACHE_ARGUMENT] = cache
        # Only ``cache`` is continued: a processor may run the model on a text of its own, as
        # classifier-free guidance does.
        with self.use_session(None):
            return self._run(ids, call)

    def _run(self, ids: Tensor | None, call: GenerationCall) -> Tensor | ModelOutput:
        result: Tensor | ModelOutput = super().generate(ids, **call.kwargs)
        return result

    def _continue(
        self, session: InferenceSession, prompt: Prompt | None, call: GenerationCall
    ) -> Tensor | ModelOutput:
        cache, kwargs = self.cache_of(session), call.kwargs
        if kwargs.get("inputs_embeds") is not None:
            raise NotSupported(
                "A session continues token ids, not embeddings.",
                hint="Pass input_ids, or generate without a session.",
            )
        past, before = session.output_ids, session.columns
        shown = _shown(prompt, 0 if past is None else past.shape[1])
        if prompt is not None and past is not None and _begins_with(prompt.ids, past):
            shown, prompt = _shown(prompt, 0), _rest_of(prompt, past.shape[1])
        ids = _with_past(past, cache, prompt)
        for name in ("use_cache", "attention_mask"):
            kwargs.pop(name, None)
        if ids is not None:
            mask = _whole_mask(cache, prompt, 0 if past is None else past.shape[1])
            kwargs["attention_mask"] = None if mask is None else mask.to(ids.device)
        num_prompts = before.num_rows or (1 if ids is None else ids.shape[0])
        call.shown = shown
        try:
            surplus = 0 if ids is None else cache.get_seq_length() - (ids.shape[1] - 1)
            if past is not None and surplus > 0:
                cache.crop(-surplus)  # at least the last token has to run, to give the next one
            if call.num_expanded > 1 and cache.batch_size == num_prompts:
                cache.batch_repeat_interleave(call.num_expanded)
            result = self._decode(ids, cache, call)
        except BaseException:
            _keep_columns(session, before.num_columns, num_prompts, 1)
            raise

        def kept(sequences: Tensor) -> Tensor:
            session.output_ids = sequences
            if call.get("num_beams", 1) > 1:
                # The prompt's columns are those of all beams; the tokens after it run again.
                num_columns = session.num_prompt_tokens + (0 if ids is None else ids.shape[1])
                _keep_columns(session, num_columns, num_prompts, len(sequences) // num_prompts)
            return shown(sequences.clone())

        return _map_sequences(result, kept)

    def _read_prompt(self, call: GenerationCall) -> Prompt | None:
        """Check the prompt and move its padding to the left; takes the mask out of ``call``."""
        ids, embeds = call.inputs, call.kwargs.get("inputs_embeds")
        if embeds is not None and ids is not None and not ids.numel():
            ids = None  # what transformers itself begins with where only embeddings are given
        if ids is not None:
            check_token_ids(ids, self.get_input_embeddings())
        columns = ids if embeds is None else embeds
        if columns is None:
            return None
        shape = columns.shape[:2]
        mask = call.kwargs.pop("attention_mask", None)
        if mask is None and ids is not None and ids.shape == shape:
            mask = mask_from_padding(ids, call)
        if shape[0] > 1 and call.has_drafts:
            raise NotSupported(
                f"Drafting works on one sequence, not on {shape[0]}.",
                hint="Generate for one prompt at a time, or without a draft.",
            )
        if mask is None or mask.shape != shape:
            return Prompt(ids, mask, ids)
        if not bool(mask.bool().any(dim=1).all()):
            raise BadInput("A prompt of the batch is empty.", hint="Leave the row out.")
        order = to_left_padding(mask)
        if order is None:
            return Prompt(ids, mask, ids)
        for name in _PER_COLUMN:
            values = call.kwargs.get(name)
            if values is not None and values.shape[1] == shape[1]:
                call.kwargs[name] = reorder_columns(values, order)
        moved = ids if ids is None or ids.shape != shape else ids.gather(1, order)
        return Prompt(moved, mask.gather(1, order), ids)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """As the original, without those options of the checkpoint that need local blocks."""
        config, rest = super()._prepare_generation_config(generation_config, **kwargs)
        for name in LOCAL_OPTIONS:
            setattr(config, name, None)
            rest.pop(name, None)
        return config, rest

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        found: CandidateGenerator = super()._get_candidate_generator(*args, **kwargs)
        cache, end = (
            kwargs["model_kwargs"][CACHE_ARGUMENT],
            kwargs["generation_config"].max_length,
        )
        room = cache.get_max_length()
        return draft_within(found, end - 1 if room < 0 else min(end - 1, room))

    def generate_batch(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises NotSupported: continuous batching of transformers is a scheduler of local keys."""
        raise NotSupported(
            "Continuous batching of transformers keeps keys and values in this process; "
            "the servers of this model batch the sessions of all clients.",
            hint="Call model.generate for a padded batch of prompts, or in several threads.",
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def _begins_with(ids: Tensor | None, past: Tensor) -> bool:
    if ids is None or ids.shape[0] != past.shape[0] or ids.shape[1] < past.shape[1]:
        return False
    return torch.equal(ids[:, : past.shape[1]], past.to(ids.device))


def _rest_of(prompt: Prompt, num_past: int) -> Prompt | None:
    """What follows the session's ids in a prompt that begins with them; None if nothing does."""
    assert prompt.ids is not None
    rest = prompt.ids[:, num_past:]
    logger.info(
        "The prompt begins with the %d tokens of the session: only the %d after them are run.",
        num_past,
        rest.shape[1],
    )
    mask = None if prompt.mask is None else prompt.mask[:, num_past:]
    return Prompt(rest, mask, rest) if rest.shape[1] else None


def _with_past(past: Tensor | None, cache: SessionCache, prompt: Prompt | None) -> Tensor | None:
    """All ids of the session followed by the prompt's."""
    new = None if prompt is None else prompt.ids
    num_known = 0 if past is None else past.shape[1]
    if cache.get_seq_length() > num_known and (past is not None or new is None):
        raise BadInput(
            f"The session was run without generate after its first {num_known} tokens, so ids of "
            "its tokens are unknown.",
            hint=f"Pass the next token ids; session.position = {num_known} drops those tokens.",
        )
    if past is None or new is None:
        return new if past is None else past
    if new.shape[0] != past.shape[0]:
        raise BadInput(
            f"The prompt has {new.shape[0]} rows, the session has {past.shape[0]}.",
            hint="Continue a session with the number of rows that it has.",
        )
    return torch.cat([past, new], dim=1)


def _whole_mask(cache: SessionCache, prompt: Prompt | None, num_past: int) -> Tensor | None:
    """The mask of the cache's columns, then of past ids not yet run, then of the prompt's."""
    kept = cache.visible
    if not kept.num_rows:
        return None if prompt is None else prompt.mask
    parts = [kept.real.long()]
    if num_past > kept.num_columns:
        parts.append(torch.ones(kept.num_rows, num_past - kept.num_columns, dtype=torch.int64))
    if prompt is not None and prompt.ids is not None:
        mask = prompt.mask if prompt.mask is not None else torch.ones_like(prompt.ids)
        if mask.shape[1] != prompt.ids.shape[1]:
            return mask
        parts.append(mask.long().cpu())
    return torch.cat(parts, dim=1)


def _keep_columns(
    session: InferenceSession, num_columns: int, num_prompts: int, num_answers: int
) -> None:
    """Keep the first columns, which all rows of a prompt share, once per answer to it."""
    columns = session.columns
    if columns.num_rows:
        expanded = columns.num_rows // num_prompts
        rows = [prompt * expanded for prompt in range(num_prompts) for _ in range(num_answers)]
        session.columns = columns.cut(num_columns).select(rows)


def _shown(prompt: Prompt | None, num_past: int) -> Callable[[Tensor], Tensor]:
    """All ids of a session -> those after its first ``num_past``, the prompt as it was given."""

    def shown(sequences: Tensor) -> Tensor:
        new = sequences[:, num_past:]
        return new if prompt is None else prompt.restore(new)

    return shown


def _map_sequences(
    result: Tensor | ModelOutput, change: Callable[[Tensor], Tensor]
) -> Tensor | ModelOutput:
    if isinstance(result, ModelOutput):
        result.sequences = change(result.sequences)
        return result
    return change(result)


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


def draft_within(candidates: CandidateGenerator, max_length: int) -> CandidateGenerator:
    """Let ``candidates`` propose no token behind the first ``max_length`` of the text.

    A generator that drafts in the tokens of another tokenizer, or looks its draft up in the prompt,
    does not count exactly. Tokens behind the end would run, need a longer session, and be dropped.
    """
    propose = candidates.get_candidates

    def get_candidates(input_ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        ids, logits = propose(input_ids, **kwargs)
        num_surplus = ids.shape[1] - max(input_ids.shape[1], max_length)
        if num_surplus <= 0:
            return ids, logits
        return ids[:, :-num_surplus], None if logits is None else logits[:, :-num_surplus]

    # On the object itself: transformers asks for its class.
    candidates.get_candidates = get_candidates
    return candidates


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)
