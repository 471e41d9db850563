"""What a low-rank adapter is like: rank, scale, and which modules it is for, as peft words it.

Reads peft's settings and refuses, with the reason, what cannot be applied to remote blocks. Knows
no tensors and no files.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from petals.errors import AdapterRefused

_KINDS: dict[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA with biases",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters (fused experts)",
}
"""Settings of peft that make something else of LoRA, and what to call it."""

_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""How the matrices began does not matter; other ways change the model's own weights as well."""

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The settings of peft's LoraConfig that count here, under its names.

    ``target_modules``: names that module paths end with, a regular expression for whole paths, or
    "all-linear". ``rank_pattern`` and ``alpha_pattern``: regular expressions for the ends of paths.
    ``modules_to_save`` are trained whole, outside the blocks. ``lora_dropout`` and
    ``fan_in_fan_out`` are only handed on to peft.
    """

    r: int = 8
    lora_alpha: float = 8.0
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            given = getattr(self, name) or ()
            put(self, name, given if isinstance(given, str) else tuple(sorted(given)))
        layers = self.layers_to_transform
        if isinstance(layers, int):
            put(self, "layers_to_transform", (layers,))
        elif layers is not None:
            put(self, "layers_to_transform", tuple(layers))
        for name in ("rank_pattern", "alpha_pattern"):
            put(self, name, dict(getattr(self, name) or {}))
        ranks = [self.r, *self.rank_pattern.values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise AdapterRefused(f"A rank is a positive number, not {self.r!r}.")
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
            raise AdapterRefused(f"lora_alpha is a number, not {self.lora_alpha!r}.")

    @classmethod
    def of(cls, settings: object) -> Self:
        """From a LoraConfig of ours or of peft, or from what an adapter_config.json holds.

        Raises AdapterRefused for other kinds of adapters.
        """
        if isinstance(settings, cls):
            return settings
        values = settings if isinstance(settings, Mapping) else _as_mapping(settings)
        _check_kind(values)
        own = {entry.name for entry in fields(cls)}
        given = {name: value for name, value in values.items() if name in own and value is not None}
        try:
            return cls(**given)
        except TypeError as error:
            raise AdapterRefused(f"The settings of the adapter make no sense: {error}.") from error

    def as_peft(self) -> dict[str, Any]:
        """The content of an adapter_config.json."""
        settings: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("exclude_modules", "modules_to_save"):
            settings[name] = settings[name] or None
        return {"peft_type": "LORA", "bias": "none", "inference_mode": True} | settings

    def targets(self, path: str, block: int) -> bool:
        """Whether the matrix at ``path`` (from the model's root), in ``block``, is adapted."""
        if self.layers_to_transform is not None and block not in self.layers_to_transform:
            return False
        if self.target_modules == ALL_LINEAR:
            return not _is_named(path, self.exclude_modules)
        return _is_named(path, self.target_modules) and not _is_named(path, self.exclude_modules)

    def rank(self, path: str) -> int:
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """What ``B @ A`` is multiplied with in the matrix at ``path``."""
        rank = self.rank(path)
        alpha = float(_by_pattern(self.alpha_pattern, path, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _as_mapping(settings: object) -> Mapping[str, Any]:
    to_dict = getattr(settings, "to_dict", None)
    values = to_dict() if callable(to_dict) else None
    if not isinstance(values, Mapping):
        raise AdapterRefused(
            f"A {type(settings).__name__} is not the config of an adapter.",
            hint="Give petals.LoraConfig(r=8, target_modules=[...]), or peft's.",
        )
    return values


def _check_kind(values: Mapping[str, Any]) -> None:
    kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type")))
    if kind != "LORA":
        raise AdapterRefused(f"An adapter of kind {kind[:32]} cannot be added to remote blocks.")
    for name, called in _KINDS.items():
        if values.get(name):
            raise AdapterRefused(
                f"{called} cannot be added to remote blocks ({name} is set).",
                hint="Plain LoRA on linear layers can; train the adapter without that setting.",
            )
    if values.get("bias", "none") != "none":
        raise AdapterRefused("An adapter that changes biases cannot be added to remote blocks.")
    if values.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterRefused(
            f"Its initialisation {str(values['init_lora_weights'])[:32]!r} changes the weights of "
            "the model itself.",
            hint="peft can save it as plain LoRA: path_initial_model_for_weight_conversion.",
        )


def _is_named(path: str, names: Sequence[str] | str) -> bool:
    """peft's rule: a regular expression must match the whole path, a name its end."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """peft's rule: the first expression that matches the end of the path."""
    found: Iterable[Any] = (
        value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)
    )
    return next(iter(found), default)
