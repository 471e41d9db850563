"""Opens the files that hold given tensors of a checkpoint, and reads the tensors lazily.

Which tensors a part of a model needs is decided by its skeleton. Knows nothing of spans or servers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from petals.errors import ModelFilesBroken
from petals.models.checkpoint.sources import Checkpoint

ReadProgress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read in all), possibly from several threads."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16}
_DTYPE_BITS |= {"BF16": 16, "I16": 16, "U16": 16, "BOOL": 8}


@dataclass(slots=True)
class _ReadMeter:
    """Counts the bytes read from all files of one loading and reports every addition."""

    total: int = 0
    done: int = 0
    report: ReadProgress | None = None

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.report is not None:
            self.report(self.done, self.total)


@dataclass(slots=True)
class LazyTensor:
    """One tensor of a safetensors file, with the interface of ``safe_open``'s slices.

    transformers indexes it (``tensor[...]``) when it is about to place the tensor on its device:
    only then are the bytes read, so that the whole part never lies in RAM twice.
    """

    view: Any
    meter: _ReadMeter = field(repr=False)

    def get_shape(self) -> list[int]:
        return self.view.get_shape()

    def get_dtype(self) -> str:
        return self.view.get_dtype()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.get_shape()) * _DTYPE_BITS.get(self.get_dtype(), 8) // 8

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.view[index]
        self.meter.add(tensor.numel() * tensor.element_size())
        return tensor


def stored_dtype(tensors: Iterable[LazyTensor]) -> torch.dtype | None:
    """The first floating dtype among ``tensors``, or None."""
    names = (tensor.get_dtype() for tensor in tensors)
    return next((_DTYPES[name] for name in names if name in _DTYPES), None)


@contextmanager
def open_tensors(
    checkpoint: Checkpoint, keys: Iterable[str], progress: ReadProgress | None = None
) -> Iterator[dict[str, LazyTensor]]:
    """Tensors by checkpoint name, from the files that hold ``keys`` and no others.

    The files stay open inside the context; a tensor is read when it is indexed.

    Raises ModelFilesBroken for a damaged file or a tensor that its file does not hold.
    """
    by_file: dict[str, list[str]] = {}
    for key in keys:
        by_file.setdefault(checkpoint.weight_map[key], []).append(key)
    meter = _ReadMeter(report=progress)
    tensors: dict[str, LazyTensor] = {}
    with ExitStack() as stack:
        for file_name in sorted(by_file):
            path = checkpoint.path(file_name)
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for key in by_file[file_name]:
                    tensors[key] = LazyTensor(file.get_slice(key), meter)
            except SafetensorError as error:
                raise ModelFilesBroken(
                    f"{file_name} of {checkpoint.name} is damaged: {error}",
                    hint="Delete the file and download it again.",
                ) from error
        meter.total = sum(tensor.num_bytes for tensor in tensors.values())
        yield tensors
