"""`generate` on remote blocks: all modes of transformers, in a session of the length they need.

Prepares the call (sessions, continuing without input, padding on the right) and passes it to the
`generate` of transformers. Contains no decoding and knows no routes or servers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.utils import ModelOutput

from petals.client.model.distributed import GeneratingModel, check_token_ids
from petals.client.model.inference_session import InferenceSession, SessionCache
from petals.client.model.padding import to_left_padding
from petals.errors import BadInput, NotSupported, RouteError
from petals.models.loading.head import HeadKind

_HUB_MODES = {
    "penalty_alpha": "Contrastive search",
    "num_beam_groups": "Group beam search",
    "constraints": "Constrained beam search",
    "force_words_ids": "Constrained beam search",
    "dola_layers": "DoLa",
}
"""Options for which transformers 5 downloads code from the hub -> the mode they select."""

_NEUTRAL = {"penalty_alpha": 0, "num_beam_groups": 1}
"""Values of those options that select nothing."""


class GenerationCall:
    """The arguments of a `generate` call after the prompt."""

    def __init__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = args[0] if args else kwargs.get("generation_config")
        self.args, self.kwargs = args, kwargs
        self._given: GenerationConfig | None = given
        self._model = model

    def get(self, name: str, default: Any = None) -> Any:
        """``name`` from the keywords, else the call's config, else the model's; not None."""
        sources = (self._given, self._model.generation_config)
        values = [self.kwargs.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in values if value is not None), default)

    @property
    def is_assistant(self) -> bool:
        """Whether another model's `generate` makes the call, to draft for it."""
        return bool(getattr(self._given, "is_assistant", False))

    @property
    def has_beams(self) -> bool:
        return bool(self.get("num_beams", 1) > 1)

    @property
    def has_drafts(self) -> bool:
        """Whether tokens are proposed and then verified."""
        assistant = self.kwargs.get("assistant_model")
        return assistant is not None or self.get("prompt_lookup_num_tokens") is not None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [rows, columns] with padding on the left, and the ids as they were given."""

    ids: Tensor
    mask: Tensor | None
    given: Tensor

    def restore(self, sequences: Tensor) -> Tensor:
        """``sequences`` [rows, columns + new] with the prompt's columns as they were given."""
        if self.given is self.ids:
            return sequences
        repeats = sequences.shape[0] // self.given.shape[0]
        prompt = self.given.repeat_interleave(repeats, dim=0)
        return torch.cat([prompt, sequences[:, prompt.shape[1] :]], dim=1)


class DistributedCausalLM(GeneratingModel):
    """A causal language model whose `generate` runs through the swarm."""

    kind = HeadKind.CAUSAL_LM
    small_model: PreTrainedModel | None = None
    """A local model that drafts in every `generate` of this one."""

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
        which may be None, and only ``inputs`` and the new tokens are returned. Without a session
        one is opened for the call, of the length it needs, and closed after it, also on an error.
        Rows padded on the right run as if padded on the left: each continues its own last token.
        Raises BadInput (empty prompt, ids outside the vocabulary), NotSupported (modes whose code
        is on the hub), LengthExceeded and the errors of the swarm; a RouteError has the ids so far
        as ``generated``, in modes without beams and drafts.
        """
        inputs = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if kwargs.get("do_sample") is not None:
            kwargs["do_sample"] = bool(kwargs["do_sample"])
        if self.small_model is not None and kwargs.get("prompt_lookup_num_tokens") is None:
            kwargs.setdefault("assistant_model", self.small_model)
        call = GenerationCall(self, args, kwargs)
        _refuse_modes(call)
        if call.is_assistant or kwargs.get("past_key_values") is not None:
            return super().generate(inputs, *args, **kwargs)
        session = session if session is not None else self.active_session
        prompt = None if inputs is None else self._read_prompt(inputs, call)
        if session is not None:
            return self._continue(session, prompt, call)
        if prompt is None:
            _check_can_start(call)
        if prompt is not None and prompt.mask is not None:
            kwargs["attention_mask"] = prompt.mask
        ids = None if prompt is None else prompt.ids
        if call.get("use_cache") is False:
            return _map_sequences(super().generate(ids, *args, **kwargs), _shown(prompt, 0))
        with self.new_cache() as cache:
            return self._decode(ids, cache, call, _shown(prompt, 0))

    def _decode(
        self,
        ids: Tensor | None,
        cache: SessionCache,
        call: GenerationCall,
        shown: Callable[[Tensor], Tensor],
    ) -> Tensor | ModelOutput:
        """transformers' own `generate`; ``shown``: all ids of the session -> what is returned."""
        cache.seen_ids = None
        try:
            result = super().generate(ids, *call.args, **call.kwargs, past_key_values=cache)
        except RouteError as error:
            if not (call.has_beams or call.has_drafts) and cache.seen_ids is not None:
                error.generated = shown(cache.seen_ids)
            raise
        return _map_sequences(result, shown)

    def _continue(
        self, session: InferenceSession, prompt: Prompt | None, call: GenerationCall
    ) -> Tensor | ModelOutput:
        cache, kwargs = self.cache_of(session), call.kwargs
        if kwargs.get("inputs_embeds") is not None:
            raise NotSupported(
                "A session continues token ids, not embeddings.",
                hint="Pass input_ids, or generate without a session.",
            )
        ids, num_past = _with_past(session.output_ids, cache, prompt)
        for name in ("use_cache", "attention_mask"):
            kwargs.pop(name, None)
        if ids is not None:
            mask = _whole_mask(cache, prompt, num_past)
            kwargs["attention_mask"] = None if mask is None else mask.to(ids.device)
            expanded = max(call.get("num_beams", 1), call.get("num_return_sequences", 1))
            if expanded > 1 and cache.batch_size == ids.shape[0]:
                cache.batch_repeat_interleave(expanded)
        shown = _shown(prompt, num_past)

        def kept(sequences: Tensor) -> Tensor:
            session.output_ids = sequences
            if call.has_beams:
                _drop_beams(cache, ids, sequences)
            return shown(sequences.clone())

        try:
            with self.use_session(session):
                return self._decode(ids, cache, call, kept)
        except RouteError:
            if call.has_beams and cache.is_initialized:
                _drop_beams(cache, ids, ids)
            raise

    def _read_prompt(self, ids: Tensor, call: GenerationCall) -> Prompt:
        """Check the prompt and move its padding to the left; takes the mask out of ``call``."""
        check_token_ids(ids, self.get_input_embeddings())
        mask = call.kwargs.pop("attention_mask", None)
        if mask is None:
            mask = _mask_from_padding(ids, call)
        if ids.shape[0] > 1 and call.has_drafts:
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

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        found: CandidateGenerator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(found, PromptLookupCandidateGenerator):
            return _BoundedCandidates(found)
        return found


class _BoundedCandidates(CandidateGenerator):
    """Prompt lookup that proposes no token after the end, so that the session needs no longer room.

    Tokens after ``max_length`` would be run and then thrown away.
    """

    def __init__(self, lookup: PromptLookupCandidateGenerator) -> None:
        self._lookup = lookup

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = self._lookup.get_candidates(input_ids, **kwargs)
        return ids[:, : max(input_ids.shape[1], self._lookup.max_length - 1)], logits

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        self._lookup.update_candidate_strategy(input_ids, scores, num_matches)


def _refuse_modes(call: GenerationCall) -> None:
    for name, mode in _HUB_MODES.items():
        value = call.get(name)
        if value is not None and value != _NEUTRAL.get(name):
            raise NotSupported(
                f"{mode} ({name}) is no part of transformers 5 any more: "
                "its code would have to be fetched from the hub and run.",
                hint="Use greedy search, sampling, beams, prompt lookup or an assistant model.",
            )
    if isinstance(call.kwargs.get("custom_generate"), str):
        raise NotSupported(
            "custom_generate would fetch code from the hub and run it.",
            hint="Pass a function of your own as custom_generate.",
        )
    if call.get("cache_implementation") is not None:
        raise NotSupported(
            "cache_implementation chooses a cache in this process; this model's is on the servers.",
            hint="Leave it out.",
        )


def _check_can_start(call: GenerationCall) -> None:
    if call.kwargs.get("inputs_embeds") is None and call.get("bos_token_id") is None:
        raise BadInput(
            "There is nothing to start from: no prompt, and the model has no BOS token.",
            hint="Pass token ids of shape [batch, tokens].",
        )


def _mask_from_padding(ids: Tensor, call: GenerationCall) -> Tensor | None:
    """The mask transformers would infer: PAD tokens are padding unless they also end sequences."""
    pad, eos = call.get("pad_token_id"), call.get("eos_token_id")
    ends = eos if isinstance(eos, list) else torch.as_tensor([] if eos is None else eos)
    if pad is None or bool((torch.as_tensor(ends) == pad).any()) or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()


def _with_past(
    past: Tensor | None, cache: SessionCache, prompt: Prompt | None
) -> tuple[Tensor | None, int]:
    """All ids of the session followed by the prompt's, and how many columns are the session's."""
    if past is None:
        if prompt is None and cache.get_seq_length() > 0:
            raise BadInput(
                "The session was run without generate, so its last token is unknown.",
                hint="Pass the next token ids.",
            )
        return (None if prompt is None else prompt.ids), 0
    if prompt is not None and prompt.ids.shape[0] != past.shape[0]:
        raise BadInput(
            f"The prompt has {prompt.ids.shape[0]} rows, the session has {past.shape[0]}.",
            hint="Continue a session with the number of rows that it has.",
        )
    ids = past if prompt is None else torch.cat([past, prompt.ids], dim=1)
    surplus = cache.get_seq_length() - (ids.shape[1] - 1)
    if surplus > 0:  # at least the last token has to run, to give the one after it
        cache.crop(-surplus)
    return ids, past.shape[1]


def _whole_mask(cache: SessionCache, prompt: Prompt | None, num_past: int) -> Tensor | None:
    """The mask of the cache's columns, then of past ids not yet run, then of the prompt's."""
    kept = cache.visible
    if not kept.num_rows:
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


def _drop_beams(cache: SessionCache, prompt: Tensor, sequences: Tensor) -> None:
    """Keep the prompt's columns, which all beams share, once per answer of ``sequences``.

    If the session is continued, the tokens after the prompt run again.
    """
    num_prompts = prompt.shape[0]
    cache.crop(min(0, prompt.shape[1] - cache.get_seq_length()))
    beams, answers = cache.batch_size // num_prompts, sequences.shape[0] // num_prompts
    rows = [prompt_row * beams for prompt_row in range(num_prompts) for _ in range(answers)]
    cache.batch_select_indices(torch.tensor(rows))


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
