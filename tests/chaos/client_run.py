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

from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from chaos.workload import Generation, GradientRun, Workload
from petals.errors import PetalsError


@dataclass(slots=True)
class Timeline:
    """When the steps of one call ended (monotonic seconds); a streamer that keeps every token.

    ``held``: seconds that the test's own callback took after each step; they count as no stall.
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

    def put(self, value: Tensor) -> None:
        """For `generate`: the prompt, then each token."""
        self.streamed += value.flatten().tolist()

    def end(self) -> None:
        """For `generate`."""


@dataclass(slots=True)
class ClientRun:
    """One call under way; training has no session."""

    call: Generation | GradientRun
    timeline: Timeline = field(default_factory=Timeline)
    session: Any = None
    output: Tensor | None = None
    error: BaseException | None = None
    _thread: threading.Thread | None = None

    def start(
        self, model: PreTrainedModel, on_step: Callable[[int], None] = lambda num_done: None
    ) -> None:
        """Begin; ``on_step(number of steps done)`` is called in the call's own thread."""
        timeline = self.timeline

        def count_step(*generated: Tensor) -> bool:
            """As a stopping criterion: never stops the generation."""
            timeline.ended.append(time.monotonic())
            on_step(len(timeline.ended))
            timeline.held.append(time.monotonic() - timeline.ended[-1])
            return False

        options: dict[str, Any] = {"on_step": count_step}
        if isinstance(self.call, Generation):
            rows = self.call.ids.shape[0] * self.call.options.get("num_beams", 1)
            length = self.call.ids.shape[1] + self.call.options["max_new_tokens"]
            self.session = model.remote_blocks.open_session(max_length=length, num_rows=rows)
            criteria = StoppingCriteriaList([count_step])
            options = {"stopping_criteria": criteria, "session": self.session}
            if self.call.is_streamable:
                options["streamer"] = timeline
        self._thread = threading.Thread(target=self._run, args=(model, options), daemon=True)
        timeline.began = time.monotonic()
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
        return max((len(hop.steps) for hop in self.session.trace.hops), default=0)

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
