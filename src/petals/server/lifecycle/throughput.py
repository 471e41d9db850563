"""How fast this machine computes, in which dtype it should, and with how many threads.

Probing dtypes takes about a second, so the result is kept on disk. A span is timed after loading,
which also warms it up. Knows no network and no sessions.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from petals.constants import DTYPE_NAMES
from petals.errors import ConfigError
from petals.logs import get_logger
from petals.models.loading import quantize
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.batch import Segment
from petals.models.runtime.kv_layout import SlabRow
from petals.models.runtime.span import Span
from petals.server.compute.scheduler import BatchCost
from petals.server.config import ComputeConfig

logger = get_logger(__name__)
PROBE_FILE = "fastest.json"
PROMPT_TOKENS = 32
"""Length of the prompt that a span is timed with."""

_DECODE_STEPS = 3
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """How blocks are stored and computed."""

    dtype: torch.dtype
    quant: QuantKind


@dataclass(frozen=True, slots=True)
class Speed:
    """Time through the whole span: of a step of one token, and of a prompt per token."""

    decode_seconds: float
    prefill_seconds_per_token: float

    def blocks_per_second(self, num_blocks: int) -> float:
        """num_blocks / decode_seconds: throughput of one session that decodes."""
        return num_blocks / max(self.decode_seconds, 1e-9)

    def bulk_blocks_per_second(self, num_blocks: int) -> float:
        """num_blocks / prefill_seconds_per_token: throughput of prompts and passes."""
        return num_blocks / max(self.prefill_seconds_per_token, 1e-9)

    def batch_cost(self) -> BatchCost:
        """The line through both measurements: the expected duration of a batch of any size."""
        prompt = PROMPT_TOKENS * self.prefill_seconds_per_token
        slope = max(0.0, (prompt - self.decode_seconds) / (PROMPT_TOKENS - 1))
        return BatchCost(max(0.0, self.decode_seconds - slope), max(slope, 1e-7))


def find_device(name: str) -> str:
    """The device for a name; "auto" is the first of cuda, mps and cpu that is available.

    Raises ConfigError if torch cannot use the device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    kind = name.partition(":")[0]
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise ConfigError(
            f"There is no {kind} device that torch can use here.",
            hint="Use --device cpu, or install a build of torch for this device.",
        )
    return name


def choose_precision(
    config: ComputeConfig, stored: torch.dtype, device: str, cache: Path
) -> Precision:
    """The dtype and quantization of ``config``.

    dtype "auto" is the fastest that holds all of the dtype in which the weights are ``stored``;
    "half" is that dtype if it has 16 bits, else bfloat16, as in the original's run_server;
    quant "auto" is int8 where that is faster. ``cache``: the folder for the result of probing.
    """
    quant = QuantKind.NONE if config.quant in ("none", "auto") else QuantKind(config.quant)
    if config.dtype == "int8":
        return Precision(torch.float32, QuantKind.INT8)
    if config.dtype == "half":
        own = stored if stored in _HALF else torch.bfloat16
        is_int8 = quant is QuantKind.INT8
        return Precision(torch.float32 if is_int8 else _on_device(own, device), quant)
    if config.dtype != "auto":
        return Precision(getattr(torch, config.dtype), quant)
    if quant is QuantKind.INT8:
        return Precision(torch.float32, quant)
    if device != "cpu":
        return Precision(_on_device(torch.bfloat16, device), quant)
    if stored not in _HALF and config.quant != "auto":
        return Precision(torch.float32, quant)
    fastest = _fastest(device, lossy=config.quant == "auto", cache=cache)
    if fastest.dtype in _HALF and stored not in _HALF:
        return Precision(torch.float32, fastest.quant)
    return fastest


def _on_device(half: torch.dtype, device: str) -> torch.dtype:
    """``half``, or float16 on a device that has no bfloat16."""
    return torch.float16 if device == "mps" else half


def choose_threads(
    asked: int | None, *, load: Callable[[], float] = lambda: os.getloadavg()[0]
) -> int:
    """``asked``, or the number of idle cores (physical cores - load average), at least 1 and at
    most torch's default.
    """
    if asked is not None:
        return asked
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(torch.get_num_threads(), round(cores - load())))


def measure(span: Span) -> Speed:
    """Time 2 prompts of 32 tokens and 3 steps of one token; the fastest of each counts."""
    row = SlabRow(span.blocks, PROMPT_TOKENS + _DECODE_STEPS)
    hidden = torch.zeros(PROMPT_TOKENS, span.hidden_size, device=span.device, dtype=span.dtype)

    def step(start: int, count: int) -> float:
        began = time.perf_counter()
        segment = Segment(hidden=hidden[:count], blocks=span.blocks, row=row, start=start)
        # Reading a value back waits for the device, which computes asynchronously.
        span.run([segment])[0][0, 0].item()
        return time.perf_counter() - began

    prefill = min(step(0, PROMPT_TOKENS) for _ in range(2))
    decode = min(step(PROMPT_TOKENS + i, 1) for i in range(_DECODE_STEPS))
    return Speed(decode, prefill / PROMPT_TOKENS)


def _fastest(device: str, *, lossy: bool, cache: Path) -> Precision:
    key = f"{device} {torch.__version__} {torch.get_num_threads()} {'lossy' if lossy else 'exact'}"
    known = _read(cache / PROBE_FILE)
    if key not in known:
        choice = quantize.choose_precision(device, lossy=lossy)
        logger.info("Probed how to compute: %s", choice.seconds)
        known[key] = [str(choice.dtype).removeprefix("torch."), str(choice.quant)]
        _write(cache / PROBE_FILE, known)
    dtype, quant = known[key]
    return Precision(getattr(torch, dtype), QuantKind(quant))


def _read(path: Path) -> dict[str, list[str]]:
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if _is_precision(value)}


def _is_precision(value: object) -> bool:
    match value:
        case [str(dtype), str(quant)]:
            return dtype in DTYPE_NAMES and quant in set(QuantKind)
        case _:
            return False


def _write(path: Path, known: dict[str, list[str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(known, indent=1), "utf-8")
        draft.replace(path)
    except OSError as error:
        logger.warning("The result of probing could not be saved: %s", error)
