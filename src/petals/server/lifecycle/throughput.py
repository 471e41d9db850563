"""How fast this machine is, and what that says about how to compute.

Probing costs about a second, so its result is kept on disk. The span itself is timed once it is
loaded, which also warms it up. Knows no network and no sessions.
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
_DECODE_STEPS = 3
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """How blocks are stored and computed."""

    dtype: torch.dtype
    quant: QuantKind


@dataclass(frozen=True, slots=True)
class Speed:
    """One session's token and a prompt's token through the whole span, in seconds."""

    decode_seconds: float
    prefill_seconds_per_token: float

    def blocks_per_second(self, num_blocks: int) -> float:
        """Blocks that one session's tokens pass per second."""
        return num_blocks / max(self.decode_seconds, 1e-9)

    def bulk_blocks_per_second(self, num_blocks: int) -> float:
        """The same for tokens that come many at a time."""
        return num_blocks / max(self.prefill_seconds_per_token, 1e-9)

    def batch_cost(self) -> BatchCost:
        """The two measurements as a line: what any batch should take."""
        prompt = PROMPT_TOKENS * self.prefill_seconds_per_token
        slope = max(0.0, (prompt - self.decode_seconds) / (PROMPT_TOKENS - 1))
        return BatchCost(max(0.0, self.decode_seconds - slope), max(slope, 1e-7))


def find_device(name: str) -> str:
    """ "auto" -> the best device here. Raises ConfigError for one that is not."""
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
    """What ``config`` says, or what is fastest here without losing what is ``stored``.

    ``cache`` is the folder where a probe's result is kept.
    """
    quant = QuantKind.NONE if config.quant in ("none", "auto") else QuantKind(config.quant)
    if config.dtype == "int8":
        return Precision(torch.float32, QuantKind.INT8)
    if config.dtype != "auto":
        return Precision(getattr(torch, config.dtype), quant)
    if quant is QuantKind.INT8:
        return Precision(torch.float32, quant)
    if device != "cpu":
        return Precision(torch.float16 if device == "mps" else torch.bfloat16, quant)
    if stored not in _HALF and config.quant != "auto":
        return Precision(torch.float32, quant)
    fastest = _fastest(device, lossy=config.quant == "auto", cache=cache)
    if fastest.dtype in _HALF and stored not in _HALF:
        return Precision(torch.float32, fastest.quant)
    return fastest


def choose_threads(
    asked: int | None, *, load: Callable[[], float] = lambda: os.getloadavg()[0]
) -> int:
    """``asked``, or the cores that are not busy with others' work, at most torch's own choice."""
    if asked is not None:
        return asked
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(torch.get_num_threads(), round(cores - load())))


def measure(span: Span) -> Speed:
    """Time a short prompt and a few tokens of one session. Takes a handful of steps."""
    row = SlabRow(span.blocks, PROMPT_TOKENS + _DECODE_STEPS)
    hidden = torch.zeros(PROMPT_TOKENS, span.hidden_size, device=span.device, dtype=span.dtype)

    def step(start: int, count: int) -> float:
        began = time.perf_counter()
        segment = Segment(hidden=hidden[:count], blocks=span.blocks, row=row, start=start)
        # Reading one value back waits for a device that works on its own time.
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
    return {key: value for key, value in known.items() if _is_note(value)}


def _is_note(value: object) -> bool:
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
        logger.warning("The probe's result could not be kept: %s", error)
