"""The table of `petals models check`: whether split models of every architecture equal the whole.

Each architecture is checked in a worker process with limits on time and memory, so that one that
crashes or hangs loses its own row only. Knows how to run and print checks, not what they compare.
"""

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from types import TracebackType

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from petals.models.verify.parity_check import VARIANTS, ParityRow, check_architecture

CheckProgress = Callable[[int, int, str], None]
"""Called with (number checked, number in all, name of the next architecture)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Time (s) that one check may take, and memory (bytes) by which its process may grow."""

    seconds: float = 120.0
    memory_bytes: int = 4 * 2**30


def architectures() -> list[str]:
    """Model types with a causal language model in the installed transformers, and variants."""
    types = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return sorted(types | set(VARIANTS))


def check(
    names: Sequence[str] | None = None,
    progress: CheckProgress | None = None,
    limits: Limits | None = None,
) -> list[ParityRow]:
    """Check the named architectures, or all; a row per name. Failures are rows, not exceptions."""
    chosen = list(names) if names else architectures()
    rows = []
    with _Worker(limits or Limits()) as worker:
        for done, name in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen), name)
            rows.append(worker.check(name))
    return rows


def to_markdown(rows: Sequence[ParityRow]) -> str:
    """The table for the documentation: exact architectures first, refused ones last."""
    served = sorted((row for row in rows if row.mode), key=lambda row: (not row.exact, row.name))
    refused = sorted((row for row in rows if not row.mode), key=lambda row: row.name)
    num_exact = sum(row.exact for row in served)
    lines = [
        f"{num_exact} of {len(rows)} architectures are exact (relative error below 1e-5 in f32).",
        "",
        "| architecture | exact | runs | prefill | decode, rollback | three sessions | scaled rope "
        "| client | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in served:
        errors = " | ".join(
            _error(e) for e in (row.prefill, row.decode, row.mixed, row.scaled, row.client)
        )
        exact = "yes" if row.exact else "no"
        lines.append(f"| {row.name} | {exact} | {row.mode} | {errors} | {_cell(row.reason)} |")
    if refused:
        lines += ["", "| not supported | reason |", "|---|---|"]
        lines += [f"| {row.name} | {_cell(row.reason)} |" for row in refused]
    return "\n".join(lines) + "\n"


class _Worker:
    """A process that checks one name after another; replaced if it dies or exceeds a limit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def check(self, name: str) -> ParityRow:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(name)
            if self._pipe.poll(self._limits.seconds):
                return ParityRow(**self._pipe.recv())
            reason = f"took longer than {self._limits.seconds:.0f} s"
        except (EOFError, OSError):
            reason = "the process that checked it died"
        self._stop()
        return ParityRow(name=name, reason=reason)

    def _start(self) -> None:
        self._pipe, far_end = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(far_end, self._limits.memory_bytes), daemon=True
        )
        process.start()
        self._process = process
        far_end.close()
        # The worker sends one message after its imports, so that the time limit of the first
        # architecture does not include them.
        with contextlib.suppress(EOFError):
            self._pipe.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection, memory_bytes: int) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _limit_memory(memory_bytes)
    pipe.send({})
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(asdict(check_architecture(pipe.recv())))


def _limit_memory(memory_bytes: int) -> None:
    """Let this process grow by ``memory_bytes`` at most, where the system has such limits."""
    try:
        import resource
    except ImportError:
        return
    limit = psutil.Process().memory_info().vms + memory_bytes
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0e}"


def _cell(text: str) -> str:
    return text.replace("|", "/")
