"""Reads the number of blocks from a config file, before torch and transformers are imported.

Importing them takes seconds, on a loaded machine tens of seconds; a wrong span is refused before.
Knows nothing of architectures: where the number is not plain, the start that follows finds it.
"""

import json
from pathlib import Path
from typing import Any

from petals.errors import BlocksNotServed
from petals.types import BlockSpan

_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of decoder layers in config files; most configs have the first."""

_TEXT = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
"""Names of the language model's own config in that of a multimodal model."""


def check_blocks(model: str, asked: BlockSpan, num_blocks: int) -> None:
    """Raises BlocksNotServed if the model does not have the blocks."""
    if asked.end > num_blocks:
        raise BlocksNotServed(
            f"{model} has blocks 0:{num_blocks}, not {asked}.",
            hint=f"Choose START:END inside 0:{num_blocks}.",
        )


def glance_at_blocks(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> int | None:
    """The number of blocks by the config of a folder or of a cached repository.

    None if there is no config without a download, or if it does not say plainly.
    """
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, "config.json", cache_dir, revision)
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    try:
        return _num_blocks(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None


def _num_blocks(settings: Any) -> int | None:
    if not isinstance(settings, dict):
        return None
    inner = [settings[name] for name in _TEXT if isinstance(settings.get(name), dict)]
    if inner:
        return _num_blocks(inner[0])
    found = {settings[name] for name in _NAMES if isinstance(settings.get(name), int)}
    return found.pop() if len(found) == 1 else None
