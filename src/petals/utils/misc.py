"""Small values that scripts of the original import."""

import torch

DUMMY = torch.empty(0)
"""Stands for prompts that are not there."""

DUMMY_INT64 = torch.empty(0, dtype=torch.int64)
"""Stands for hypothesis ids that are not there."""

DUMMY_KEY_PAST = torch.empty((0, 0, 0))
"""Stands for the empty cache of a block of ``server.from_pretrained.load_pretrained_block``."""


def is_dummy(tensor: torch.Tensor) -> bool:
    """Whether the tensor has no elements."""
    return tensor.numel() == 0


def get_size_in_bytes(dtype: torch.dtype) -> int:
    """Bytes of one value."""
    return dtype.itemsize
