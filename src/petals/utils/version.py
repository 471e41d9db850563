"""The original's names of repositories that it had repackaged."""

from petals.models.checkpoint.sources import ALIASES

__all__ = ["get_compatible_model_repo"]


def get_compatible_model_repo(model_name_or_path: str | None) -> str | None:
    """``bigscience/bloom`` for ``bigscience/bloom-petals``; other names as they are."""
    return ALIASES.get(model_name_or_path or "", model_name_or_path)
