"""The call of `generate`: its arguments by name, what is refused, and what it has generated.

Knows which options of transformers a model with remote blocks cannot follow. Knows no session and
runs nothing.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteria

from petals.client.model.session_cache import SessionCache, name_cache
from petals.errors import BadInput, NotSupported

_HUB_MODES = {
    "penalty_alpha": "Contrastive search",
    "num_beam_groups": "Group beam search",
    "constraints": "Constrained beam search",
    "force_words_ids": "Constrained beam search",
    "dola_layers": "DoLa",
}
"""Options for which transformers 5 downloads code from the hub -> the mode they select."""

_NEUTRAL = {"penalty_alpha": 0, "num_beam_groups": 1, "cache_implementation": "dynamic"}
"""Values of options that select nothing."""

_DRAFT = "Draft with assistant_model=... or prompt_lookup_num_tokens=..."
_READ = "Run model(ids, output_hidden_states=True) on the text afterwards; attention maps need a "
LOCAL_OPTIONS = {
    "cache_implementation": ("chooses a cache in this process", "Leave it out."),
    "assistant_early_exit": ("drafts with the first blocks alone, in this process", _DRAFT),
    "use_mtp": ("drafts from the last block's states with weights that no client loads", _DRAFT),
    "output_attentions": ("returns what the blocks compute inside", _READ + "local model."),
    "output_hidden_states": ("returns what the blocks compute inside", _READ + "local model."),
}
"""Options that need the blocks in this process, and change no token -> why, and a hint. Refused if
the caller asks for them; a checkpoint's own generation config may hold them (Gemma's does)."""

_POSITIONAL = [
    name
    for name, parameter in inspect.signature(GenerationMixin.generate).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
][2:]
"""Names of the arguments of `generate` after ``self`` and ``inputs``."""


class IdsSoFar(StoppingCriteria):
    """Records the ids of a `generate` call after every token, and never stops it.

    ids: [rows, columns] int64; of beams, the candidates of each prompt, best first.
    """

    ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.ids = input_ids
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class GenerationCall:
    """The arguments of one `generate` call, by name, and what it has generated.

    A context manager around all that may fail in the call.
    """

    def __init__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.kwargs = name_cache(dict(zip(_POSITIONAL, args)) | kwargs)
        self.inputs: Tensor | None = self.kwargs.pop("inputs", None)
        if self.inputs is None:
            self.inputs = self.kwargs.pop("input_ids", None)
        if self.kwargs.get("do_sample") is not None:
            self.kwargs["do_sample"] = bool(self.kwargs["do_sample"])
        self.shown: Callable[[Tensor], Tensor] = _unchanged
        """All ids of the session -> those that the call returns."""
        self._given: GenerationConfig | None = self.kwargs.get("generation_config")
        self._model = model
        self._so_far = IdsSoFar()
        self._num_prompts = 1

    def get(self, name: str, default: Any = None) -> Any:
        """``name`` from the keywords, else the call's config, else the model's; not None."""
        return next((value for value in self._values(name) if value is not None), default)

    def asks(self, name: str) -> bool:
        """Whether the caller, and not only the checkpoint's own config, sets ``name``."""
        *given, own = self._values(name)
        asked = next((value for value in given if value is not None), None)
        return asked not in (None, False, own, _NEUTRAL.get(name))

    def _values(self, name: str) -> list[Any]:
        sources = (self._given, self._model.generation_config)
        return [self.kwargs.get(name), *(getattr(source, name, None) for source in sources)]

    @property
    def is_assistant(self) -> bool:
        """Whether another model's `generate` makes the call, to draft for it."""
        return bool(getattr(self._given, "is_assistant", False))

    @property
    def num_expanded(self) -> int:
        """Rows that run for each prompt."""
        return max(self.get("num_beams", 1), self.get("num_return_sequences", 1))

    @property
    def has_drafts(self) -> bool:
        """Whether tokens are proposed and then verified."""
        assistant = self.kwargs.get("assistant_model")
        return assistant is not None or self.get("prompt_lookup_num_tokens") is not None

    def begin(self, ids: Tensor | None) -> None:
        """Record the ids from now on; ``ids`` [prompts, columns] are those that it begins with."""
        if ids is not None:
            self._num_prompts, self._so_far.ids = ids.shape[0], ids
        given = self.kwargs.get("stopping_criteria")
        # The first criterion: it has seen a token before a criterion of the caller can raise.
        self.kwargs["stopping_criteria"] = [self._so_far, *(given if given is not None else ())]

    def __enter__(self) -> "GenerationCall":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """On every error: set ``generated``, and end the streamer, so that its reader ends, too."""
        if error is None:
            return
        error.generated = self._generated()  # type: ignore[attr-defined]
        streamer = self.kwargs.get("streamer")
        try:
            if streamer is not None:
                streamer.end()
        finally:  # the streamer may be what is broken
            raise error

    def _generated(self) -> Tensor | None:
        """The ids so far, in the shape of the result; of beams, the best that were running."""
        ids = self._so_far.ids
        if ids is None:
            return None
        ids = ids.view(self._num_prompts, -1, ids.shape[1])
        return self.shown(ids[:, : self.get("num_return_sequences", 1)].flatten(0, 1))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [rows, columns] with padding on the left, and the ids as they were given.

    Without ids the prompt is the call's ``inputs_embeds``.
    """

    ids: Tensor | None
    mask: Tensor | None
    given: Tensor | None

    def restore(self, sequences: Tensor) -> Tensor:
        """``sequences`` [rows, columns + new] with the prompt's columns as they were given."""
        if self.given is None or self.given is self.ids:
            return sequences
        repeats = sequences.shape[0] // self.given.shape[0]
        prompt = self.given.repeat_interleave(repeats, dim=0)
        return torch.cat([prompt, sequences[:, prompt.shape[1] :]], dim=1)


def _unchanged(sequences: Tensor) -> Tensor:
    return sequences


def refuse_modes(call: GenerationCall) -> None:
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
    for name, (why, hint) in LOCAL_OPTIONS.items():
        is_returned = not name.startswith("output_") or call.get("return_dict_in_generate")
        if is_returned and call.asks(name):
            raise NotSupported(f"{name} {why}; this model's blocks are on the servers.", hint=hint)


def check_can_start(call: GenerationCall) -> None:
    if call.get("bos_token_id") is None:
        raise BadInput(
            "There is nothing to start from: no prompt, and the model has no BOS token.",
            hint="Pass token ids of shape [batch, tokens].",
        )


def check_continues(cache: object, call: GenerationCall) -> None:
    """Raises BadInput for ids that do not continue ``past_key_values`` that are given."""
    ids, mask = call.inputs, call.kwargs.get("attention_mask")
    if not isinstance(cache, SessionCache) or ids is None:
        return
    num_past, num_ids = cache.get_seq_length(), ids.shape[-1]
    num_columns = num_ids if mask is None else mask.shape[-1]
    if num_columns == num_ids > num_past or num_columns == num_past + num_ids:
        return
    raise BadInput(
        f"{num_ids} token ids with a mask of {num_columns} columns do not continue past_key_values "
        f"of {num_past} tokens.",
        hint=f"Pass all ids, those {num_past} and the new ones; or the new ones alone with an "
        "attention_mask that covers all.",
    )


def mask_from_padding(ids: Tensor, call: GenerationCall) -> Tensor | None:
    """The mask transformers would infer: PAD tokens are padding unless they also end sequences."""
    pad, eos = call.get("pad_token_id"), call.get("eos_token_id")
    ends = eos if isinstance(eos, list) else torch.as_tensor([] if eos is None else eos)
    if pad is None or bool((torch.as_tensor(ends) == pad).any()) or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()
