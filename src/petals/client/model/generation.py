"""`generate` on remote blocks: all of transformers' modes, in a session of the length they need.

Prepares the call (what the old Petals promised on top of transformers: sessions, continuing with
no input) and hands it to the stock `generate`. Must not know routes or servers, nor any arithmetic
of decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.utils import ModelOutput

from petals.client.model.padding import to_left_padding
from petals.client.model.remote_cache import RemoteCache
from petals.errors import BadInput, NotSupported, RouteError

_HUB_MODES = {
    "penalty_alpha": "Contrastive search",
    "num_beam_groups": "Group beam search",
    "constraints": "Constrained beam search",
    "force_words_ids": "Constrained beam search",
    "dola_layers": "DoLa",
}
"""Options that transformers 5 answers with code from the hub -> what they ask for."""

_NEUTRAL: dict[str, Any] = {"penalty_alpha": 0, "num_beam_groups": 1}
"""Values of those options that ask for nothing."""


class GenerationOptions:
    """What a `generate` call asks for: its keywords, else its config, else the model's own."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("generation_config")
        self._given: GenerationConfig | None = given
        self._model = model
        self._kwargs = kwargs

    def get(self, name: str, default: Any = None) -> Any:
        """The first value of ``name`` that is not None."""
        sources = (self._given, self._model.generation_config)
        values = [self._kwargs.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in values if value is not None), default)

    @property
    def is_assistant(self) -> bool:
        """Whether another model's `generate` makes the call, to draft for it."""
        return bool(getattr(self._given, "is_assistant", False))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [rows, columns] with padding on the left, and the ids as they were given."""

    ids: Tensor
    mask: Tensor | None
    given: Tensor

    def restore(self, sequences: Tensor) -> Tensor:
        """Put the prompt's columns at the end of a left-padded prompt back as they were given."""
        if self.given is self.ids:
            return sequences
        repeats = sequences.shape[0] // self.given.shape[0]
        prompt = self.given.repeat_interleave(repeats, dim=0)
        return torch.cat([prompt, sequences[:, prompt.shape[1] :]], dim=1)


class RemoteGeneration:
    """Mixin over a causal model of transformers: `generate` with sessions."""

    @torch.no_grad()
    def generate(
        self: Any, inputs: Tensor | None = None, *args: Any, session: Any = None, **kwargs: Any
    ) -> Any:
        """Token ids [batch, prompt + new] int64, or a ModelOutput, as transformers gives them.

        ``session`` (or the active one) is continued: its earlier tokens come before ``inputs``,
        which may be None, and only ``inputs`` and the new tokens are returned. Without a session
        one is opened for the call, of the length it needs, and closed after it, also on an error.
        Rows padded on the right run as if padded on the left: each continues its own last token.
        Raises BadInput (empty prompt, ids outside the vocabulary), NotSupported (modes whose code
        is on the hub), LengthExceeded and what the swarm raises.
        """
        inputs = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if kwargs.get("do_sample") is not None:
            kwargs["do_sample"] = bool(kwargs["do_sample"])
        options = GenerationOptions(self, args, kwargs)
        _refuse_modes(options, kwargs)
        if options.is_assistant or kwargs.get("past_key_values") is not None:
            return self._decode(inputs, *args, **kwargs)
        session = session if session is not None else self.active_session
        prompt = None if inputs is None else self._read_prompt(inputs, kwargs, options)
        if session is not None:
            return self._continue(session, prompt, args, kwargs)
        if prompt is None:
            _check_can_start(options, kwargs)
        if options.get("use_cache") is False:
            return self._run(prompt, args, kwargs)
        with self.new_cache() as cache:
            try:
                return self._run(prompt, args, kwargs | {"past_key_values": cache})
            except RouteError as error:
                if _grows_by_columns(options, kwargs) and cache.seen_ids is not None:
                    given = prompt.restore if prompt is not None else _same
                    error.generated = given(cache.seen_ids)
                raise

    def _decode(self, ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `generate`."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, RemoteCache) and ids is not None:
            cache.is_of_same_ids = mask is None or mask.shape[1] == ids.shape[1]
        transformers: Any = super()
        return transformers.generate(ids, *args, **kwargs)

    def _run(self: Any, prompt: Prompt | None, args: tuple[Any, ...], kwargs: Any) -> Any:
        if prompt is None:
            return self._decode(None, *args, **kwargs)
        if prompt.mask is not None:
            kwargs = kwargs | {"attention_mask": prompt.mask}
        result = self._decode(prompt.ids, *args, **kwargs)
        return _map_sequences(result, prompt.restore)

    def _continue(
        self: Any, session: Any, prompt: Prompt | None, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        cache = self.cache_of(session)
        if kwargs.get("inputs_embeds") is not None:
            raise NotSupported(
                "A session continues token ids, not embeddings.",
                hint="Pass input_ids, or generate without a session.",
            )
        ids, num_past = _with_past(session.output_ids, cache, prompt)
        options = GenerationOptions(self, args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "use_cache")}
        if ids is not None:
            mask = _whole_mask(cache, prompt, num_past)
            kwargs["attention_mask"] = None if mask is None else mask.to(ids.device)
            expanded = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
            if expanded > 1 and cache.batch_size == ids.shape[0]:
                cache.batch_repeat_interleave(expanded)
        given = prompt.restore if prompt is not None else _same
        cache.seen_ids = None
        try:
            with self.use_session(session):
                result = self._decode(ids, *args, past_key_values=cache, **kwargs)
        except RouteError as error:
            if _grows_by_columns(options, kwargs) and cache.seen_ids is not None:
                # The session can go on from here later.
                session.output_ids = cache.seen_ids
                error.generated = given(cache.seen_ids[:, num_past:].clone())
            elif options.get("num_beams", 1) > 1 and cache.rows is not None:
                _forget_beams(cache, ids, ids)
            raise
        sequences = result.sequences if isinstance(result, ModelOutput) else result
        if options.get("num_beams", 1) > 1:
            _forget_beams(cache, ids, sequences)
        cache.tell_position()
        session.output_ids = sequences
        return _map_sequences(result, lambda whole: given(whole[:, num_past:].clone()))

    def _read_prompt(
        self: Any, ids: Tensor, kwargs: dict[str, Any], options: GenerationOptions
    ) -> Prompt:
        """Check the prompt and move its padding to the left; takes the mask out of ``kwargs``."""
        self.check_token_ids(ids)
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = _mask_from_padding(ids, options)
        if ids.shape[0] > 1 and _drafts(options, kwargs):
            raise NotSupported(
                f"Drafting works on one sequence, not on {ids.shape[0]}.",
                hint="Generate for one prompt at a time, or without a draft.",
            )
        if mask is None or mask.shape != ids.shape:
            return Prompt(ids, mask, ids)
        if not bool(mask.bool().any(dim=1).all()):
            raise BadInput("A prompt of the batch is empty.", hint="Leave the row out.")
        order = to_left_padding(mask)
        if order is None:
            return Prompt(ids, mask, ids)
        return Prompt(ids.gather(1, order), mask.gather(1, order), ids)

    # What transformers calls while it generates

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: object,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let the session reserve what this generation needs; a draft's grows with its rounds."""
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self.new_cache()
        if isinstance(cache, RemoteCache) and not generation_config.is_assistant:
            cache.reserve(max_cache_length)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Drop what has run already: transformers forgets to where a draft is verified first."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, RemoteCache):
            cache.seen_ids = input_ids
        if next_sequence_length is None and isinstance(cache, RemoteCache):
            past_length = cache.get_seq_length()
            if cache.is_of_same_ids and 0 < past_length < input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - past_length
        transformers: Any = super()
        inputs: dict[str, Any] = transformers.prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs
        )
        return inputs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        transformers: Any = super()
        found: CandidateGenerator = transformers._get_candidate_generator(*args, **kwargs)
        if isinstance(found, PromptLookupCandidateGenerator):
            return _BoundedCandidates(found)
        return found


class _BoundedCandidates(CandidateGenerator):
    """Prompt lookup that proposes no token behind the end: none is run, so none needs a place."""

    def __init__(self, lookup: PromptLookupCandidateGenerator) -> None:
        self._lookup = lookup

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = self._lookup.get_candidates(input_ids, **kwargs)
        return ids[:, : max(input_ids.shape[1], self._lookup.max_length - 1)], logits

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        self._lookup.update_candidate_strategy(input_ids, scores, num_matches)


def _refuse_modes(options: GenerationOptions, kwargs: dict[str, Any]) -> None:
    for name, mode in _HUB_MODES.items():
        value = options.get(name)
        if value is not None and value != _NEUTRAL.get(name):
            raise NotSupported(
                f"{mode} ({name}) is no part of transformers 5 any more: "
                "its code would have to be fetched from the hub and run.",
                hint="Use greedy search, sampling, beams, prompt lookup or an assistant model.",
            )
    if isinstance(kwargs.get("custom_generate"), str):
        raise NotSupported(
            "custom_generate would fetch code from the hub and run it.",
            hint="Pass a function of your own as custom_generate.",
        )
    if options.get("cache_implementation") is not None:
        raise NotSupported(
            "cache_implementation chooses a cache in this process; this model's is on the servers.",
            hint="Leave it out.",
        )


def _drafts(options: GenerationOptions, kwargs: dict[str, Any]) -> bool:
    assistant = kwargs.get("assistant_model")
    return assistant is not None or options.get("prompt_lookup_num_tokens") is not None


def _grows_by_columns(options: GenerationOptions, kwargs: dict[str, Any]) -> bool:
    """True if every token looked at is part of the answer: no beams, no guesses."""
    return options.get("num_beams", 1) == 1 and not _drafts(options, kwargs)


def _same(ids: Tensor) -> Tensor:
    return ids


def _check_can_start(options: GenerationOptions, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is None and options.get("bos_token_id") is None:
        raise BadInput(
            "There is nothing to start from: no prompt, and the model has no BOS token.",
            hint="Pass token ids of shape [batch, tokens].",
        )


def _mask_from_padding(ids: Tensor, options: GenerationOptions) -> Tensor | None:
    """The mask transformers would infer: PAD tokens are padding unless they also end sequences."""
    pad, eos = options.get("pad_token_id"), options.get("eos_token_id")
    ends = eos if isinstance(eos, list) else torch.as_tensor([] if eos is None else eos)
    if pad is None or bool((torch.as_tensor(ends) == pad).any()) or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()


def _with_past(
    past: Tensor | None, cache: RemoteCache, prompt: Prompt | None
) -> tuple[Tensor | None, int]:
    """All ids of the session with the new ones behind them, and how many of them are old."""
    if past is None:
        if prompt is None and cache.get_seq_length() > 0:
            raise BadInput(
                "The session was fed without generate, so its last token is unknown here.",
                hint="Pass the next token ids.",
            )
        return (None if prompt is None else prompt.ids), 0
    if prompt is not None and prompt.ids.shape[0] != past.shape[0]:
        raise BadInput(
            f"The prompt has {prompt.ids.shape[0]} rows, the session has {past.shape[0]}.",
            hint="Continue a session with the rows it was begun with.",
        )
    ids = past if prompt is None else torch.cat([past, prompt.ids], dim=1)
    surplus = cache.get_seq_length() - (ids.shape[1] - 1)
    if surplus > 0:  # at least the last token has to run, to say what follows it
        cache.crop(-surplus)
    return ids, past.shape[1]


def _whole_mask(cache: RemoteCache, prompt: Prompt | None, num_past: int) -> Tensor | None:
    """Mask over the cache's columns, the past's unseen ones and the prompt's, in this order."""
    kept = cache.rows
    if kept is None:
        return None if prompt is None else prompt.mask
    parts = [kept.real.long()]
    if num_past > kept.num_columns:
        parts.append(torch.ones(kept.num_rows, num_past - kept.num_columns, dtype=torch.int64))
    if prompt is not None:
        mask = prompt.mask if prompt.mask is not None else torch.ones_like(prompt.ids)
        if mask.shape[1] != prompt.ids.shape[1]:
            return mask
        parts.append(mask.long().cpu())
    return torch.cat(parts, dim=1)


def _forget_beams(cache: RemoteCache, prompt: Tensor, sequences: Tensor) -> None:
    """Keep what all beams share, the prompt, once per answer; answers run again if continued."""
    num_prompts = prompt.shape[0]
    cache.crop(min(0, prompt.shape[1] - cache.get_seq_length()))
    beams, answers = cache.batch_size // num_prompts, sequences.shape[0] // num_prompts
    rows = [prompt_row * beams for prompt_row in range(num_prompts) for _ in range(answers)]
    cache.batch_select_indices(torch.tensor(rows))


def _map_sequences(result: Any, change: Any) -> Any:
    if isinstance(result, ModelOutput):
        result.sequences = change(result.sequences)
        return result
    return change(result)
