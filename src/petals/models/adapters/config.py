"""The settings of a low-rank adapter, in peft's terms: rank, scaling, target modules.

Reads peft's settings and refuses, with the reason, those that cannot be applied to remote blocks.
Knows no tensors and no files.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from petals.errors import AdapterRefused

_UNSUPPORTED_SETTINGS: dict[str, str] = {
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
"""Settings of peft that turn LoRA into another method -> the name of the method."""

_SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that concern the adapter's matrices only; others change the
weights of the model, too.
"""

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The settings of peft's LoraConfig that are used here, under peft's names.

    target_modules, exclude_modules: the last names of module paths, or a regular expression for
    whole paths; target_modules may be "all-linear".
    rank_pattern, alpha_pattern: a regular expression for the end of a path -> its rank or alpha.
    modules_to_save: modules outside the blocks that are trained as a whole. ensure_weight_tying:
    modules that are tied to one of these take its new weight; by default they keep their own.
    lora_dropout, fan_in_fan_out: only passed on to peft.

    Raises AdapterRefused for ranks that are not positive and alphas that are not finite.
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
    ensure_weight_tying: bool = False
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            given = getattr(self, name) or ()
            set_field(self, name, given if isinstance(given, str) else tuple(sorted(given)))
        layers = self.layers_to_transform
        if isinstance(layers, int):
            set_field(self, "layers_to_transform", (layers,))
        elif layers is not None:
            set_field(self, "layers_to_transform", tuple(layers))
        for name in ("rank_pattern", "alpha_pattern"):
            set_field(self, name, dict(getattr(self, name) or {}))
        ranks = [self.r, *self.rank_pattern.values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise AdapterRefused(f"A rank is a positive number, not {self.r!r}.")
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
            raise AdapterRefused(f"lora_alpha is a number, not {self.lora_alpha!r}.")

    @classmethod
    def of(cls, settings: object) -> Self:
        """From this class, from peft's LoraConfig, or from the content of an adapter_config.json.

        Raises AdapterRefused for adapters other than plain LoRA.
        """
        if isinstance(settings, cls):
            return settings
        values = settings if isinstance(settings, Mapping) else _as_mapping(settings)
        _check_is_plain_lora(values)
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
        """Whether the matrix at ``path`` (from the root of the model), in ``block``, is adapted."""
        if self.layers_to_transform is not None and block not in self.layers_to_transform:
            return False
        if self.target_modules == ALL_LINEAR:
            return not _matches(path, self.exclude_modules)
        return _matches(path, self.target_modules) and not _matches(path, self.exclude_modules)

    def rank(self, path: str) -> int:
        """The rank of the adapter of the matrix at ``path``."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """The factor on ``B @ A`` for the matrix at ``path``: alpha / rank, or alpha / sqrt(rank)
        with ``use_rslora``.
        """
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


def _check_is_plain_lora(values: Mapping[str, Any]) -> None:
    peft_type = str(getattr(values.get("peft_type"), "value", values.get("peft_type")))
    if peft_type != "LORA":
        raise AdapterRefused(
            f"An adapter of kind {peft_type[:32]} cannot be added to remote blocks."
        )
    for name, method in _UNSUPPORTED_SETTINGS.items():
        if values.get(name):
            raise AdapterRefused(
                f"{method} cannot be added to remote blocks ({name} is set).",
                hint="Plain LoRA on linear layers can; train the adapter without that setting.",
            )
    if values.get("bias", "none") != "none":
        raise AdapterRefused("An adapter that changes biases cannot be added to remote blocks.")
    if values.get("init_lora_weights") not in _SUPPORTED_INITS:
        raise AdapterRefused(
            f"Its initialisation {str(values['init_lora_weights'])[:32]!r} changes the weights of "
            "the model itself.",
            hint="peft can save it as plain LoRA: path_initial_model_for_weight_conversion.",
        )


def _matches(path: str, names: Sequence[str] | str) -> bool:
    """peft's rule: a regular expression must match the whole path, a name the end of the path."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(path == name or path.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """peft's rule: the first expression that matches the end of the path."""
    found: Iterable[Any] = (
        value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)
    )
    return next(iter(found), default)
