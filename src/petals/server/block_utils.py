"""The original's rule for the dtype of blocks, and their size."""

import torch
from transformers import PretrainedConfig

from petals.models.loading.cost import block_costs, compute_dtype
from petals.models.loading.quantize import QuantKind


def resolve_block_dtype(
    config: PretrainedConfig, dtype: str | torch.dtype | None = "auto"
) -> torch.dtype:
    """``dtype`` if it is one; for "auto" and None the dtype of the checkpoint, but bfloat16 in
    place of float32.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = compute_dtype(config, None)
    return torch.bfloat16 if stored is torch.float32 else stored


def get_block_size(
    config: PretrainedConfig,
    location: str,
    *,
    dtype: str | torch.dtype | None = None,
    quant_type: QuantKind = QuantKind.NONE,
) -> int:
    """Bytes of the weights of one block, the largest, in "memory" or on "disk"."""
    if location == "disk":
        dtype, quant_type = "auto", QuantKind.NONE
    resolved = resolve_block_dtype(config, dtype)
    return max(cost.weight_bytes for cost in block_costs(config, dtype=resolved, quant=quant_type))
