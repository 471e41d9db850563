"""One client's call under way: in a thread of its own, with the times at which its steps ended.

In training a step is a forward or a backward pass. Knows models; knows no faults.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chaos.workload import Generation, GradientRun, Workload
from petals.errors import PetalsError


@dataclass(slots=True)
class Timeline:
    """When the steps of one call ended (monotonic seconds), and which tokens were streamed.

    ``held``: seconds that a test's own callbacks took after each step; they count as no stall.
    """

    began: float = field(default_factory=time.monotonic)
    ended: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    streamed: list[int] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between steps; the first is the prefill's."""
        starts = [self.began, *(end + held for end, held in zip(self.ended, self.held))]
        return [end - start for start, end in zip(starts, self.ended)]

    @property
    def step_seconds(self) -> float:
        """The median gap after the prefill."""
        return median(self.gaps[1:]) if len(self.ended) > 1 else 0.0


class StepCounter(StoppingCriteria):
    """Calls ``on_step(number of steps done)`` after every step; never stops a generation."""

    def __init__(self, timeline: Timeline, on_step: Callable[[int], None]) -> None:
        self._timeline = timeline
        self._on_step = on_step

    def count(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._timeline.ended.append(now)
        self._on_step(len(self._timeline.ended))
        self._timeline.held.append(time.monotonic() - now)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.count()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class StreamRecorder(BaseStreamer):
    """Keeps every token that was streamed, the prompt included."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def put(self, value: Tensor) -> None:
        self._timeline.streamed += value.flatten().tolist()

    def end(self) -> None:
        pass


@dataclass(slots=True)
class ClientRun:
    """One call under way; training has no session."""

    call: Generation | GradientRun
    timeline: Timeline = field(default_factory=Timeline)
    session: Any = None
    output: Tensor | None = None
    error: BaseException | None = None
    _thread: threading.Thread | None = None

    def start(self, model: PreTrainedModel, on_step: Callable[[int], None]) -> None:
        """Begin; ``on_step`` is called in the call's own thread."""
        counter = StepCounter(self.timeline, on_step)
        options: dict[str, Any] = {}
        if isinstance(self.call, GradientRun):
            options["on_step"] = counter.count
        else:
            options["stopping_criteria"] = StoppingCriteriaList([counter])
            if self.call.is_streamable:
                options["streamer"] = StreamRecorder(self.timeline)
            rows = self.call.ids.shape[0] * self.call.options.get("num_beams", 1)
            length = self.call.ids.shape[1] + self.call.options["max_new_tokens"]
            self.session = model.remote_blocks.open_session(max_length=length, num_rows=rows)
            options["session"] = self.session
        self._thread = threading.Thread(target=self._run, args=(model, options), daemon=True)
        self.timeline.began = time.monotonic()
        self._thread.start()

    def join(self, deadline: float) -> bool:
        """Whether it ended, by itself or with an error, before ``deadline``."""
        assert self._thread is not None
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_chunks(self) -> int:
        """Chunks of the prefill whose results have arrived."""
        hops = self.session.trace.hops
        return max((len(hop.steps) for hop in hops), default=0)

    def _run(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        try:
            self.output = self.call.run(model, **options)
        except BaseException as error:  # the thread's caller looks at it after `join`
            self.error = error


@contextmanager
def client_runs(workload: Workload) -> Iterator[list[ClientRun]]:
    """A run for each call of a workload; their sessions are closed afterwards."""
    runs = [ClientRun(call) for call in workload.calls]
    try:
        yield runs
    finally:
        for run in runs:
            if run.session is not None and not run.is_alive:
                with contextlib.suppress(PetalsError):
                    run.session.close()
