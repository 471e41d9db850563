"""The original's check of an adapter's repository."""

from petals.models.adapters.files import WEIGHTS_FILE
from petals.models.checkpoint.hub import HubAccess, has_file

__all__ = ["check_peft_repository"]


def check_peft_repository(repo_id: str) -> bool:
    """Whether the repository has its adapter in safetensors. Raises ModelNotFound."""
    return has_file(repo_id, WEIGHTS_FILE, HubAccess())
