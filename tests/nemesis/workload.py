"""What clients do while things go wrong: a call of `generate` for each phase, and its answer.

A metronome rides on the call: it notes when each step ended and rings before the next begins. In
training a step is a pass forward or back, and the answer is the gradients. The answers are those of
the local model. Knows models and tokens; knows no faults.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nemesis.schedule import Phase

NUM_CLIENTS = 8
PREFILL_CHUNK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `generate`: ids [rows, columns], mask of the same shape, options."""

    ids: Tensor
    mask: Tensor
    options: Mapping[str, Any]

    @property
    def is_streamable(self) -> bool:
        return self.ids.shape[0] == 1 and self.options.get("num_beams", 1) == 1

    def run(self, model: PreTrainedModel, **more: Any) -> Tensor:
        """Token ids [rows, columns + new]."""
        return model.generate(self.ids, attention_mask=self.mask, **self.options, **more)


@dataclass(frozen=True, slots=True)
class Lesson:
    """Batches that are learned from: ids [batches, rows, columns]."""

    ids: Tensor

    def run(self, model: PreTrainedModel, on_step: Callable[[], None] = lambda: None) -> Tensor:
        """The gradients of the embedded inputs, [batches, rows, columns, H]."""
        found = []
        for ids in self.ids:
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
            on_step()
            loss.backward()
            on_step()
            assert embeds.grad is not None
            found.append(embeds.grad)
        return torch.stack(found)


@dataclass(frozen=True, slots=True)
class Workload:
    """What all clients of a phase do at the same time, and what they have to hear."""

    phase: Phase
    calls: tuple[Call | Lesson, ...]
    answers: tuple[Tensor, ...]


def make_workload(local: PreTrainedModel, phase: Phase, scale: int = 2) -> Workload:
    """The same for every run: ``scale`` stretches the number of tokens."""
    calls = _calls(phase, local.config.get_text_config().vocab_size, scale)
    return Workload(phase, calls, tuple(call.run(local) for call in calls))


def _calls(phase: Phase, vocab_size: int, scale: int) -> tuple[Call | Lesson, ...]:
    random = torch.Generator().manual_seed(len(phase))
    first, end = min(5, vocab_size // 2), min(20_000, vocab_size)

    def ids(rows: int, columns: int) -> Tensor:
        return torch.randint(first, end, (rows, columns), generator=random)

    def call(prompt: Tensor, num_tokens: int, **options: Any) -> Call:
        # No token ends an answer: all have the same length.
        fixed = {"do_sample": False, "eos_token_id": vocab_size, "pad_token_id": 0}
        options = {"max_new_tokens": num_tokens * scale, **fixed, **options}
        return Call(prompt, torch.ones_like(prompt), options)

    match phase:
        case Phase.PREFILL:
            return (call(ids(1, 8 * PREFILL_CHUNK_TOKENS * scale), 4),)
        case Phase.DECODE:
            return (call(ids(1, 12), 20),)
        case Phase.ROLLBACK:
            return (call(ids(1, 6).repeat(1, 4), 20, prompt_lookup_num_tokens=4),)
        case Phase.BEAMS:
            return (call(ids(1, 10), 14, num_beams=3),)
        case Phase.BATCH:
            batch = call(ids(4, 12), 12)
            for row, padding in enumerate((0, 5, 2, 9)):
                batch.mask[row, :padding] = 0
                batch.ids[row, :padding] = 0
            return (batch,)
        case Phase.TRAINING:
            return (Lesson(ids(8 * scale * 4, 12).view(8 * scale, 4, 12)),)
        case Phase.CROWD:
            return tuple(call(ids(1, 6 + number), 8) for number in range(NUM_CLIENTS))


@dataclass(slots=True)
class Tape:
    """When the steps of one call ended (monotonic seconds), and what was streamed.

    ``held`` are seconds spent inside our own hooks, by step; they are nobody's stall.
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


class Metronome(StoppingCriteria):
    """Rings ``on_step(number of steps done)`` after every step; never stops a generation."""

    def __init__(self, tape: Tape, on_step: Callable[[int], None]) -> None:
        self._tape = tape
        self._on_step = on_step

    def ring(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._tape.ended.append(now)
        self._on_step(len(self._tape.ended))
        self._tape.held.append(time.monotonic() - now)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ring()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Collector(BaseStreamer):
    """Keeps everything that was streamed, the prompt included."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def put(self, value: Tensor) -> None:
        self._tape.streamed += value.flatten().tolist()

    def end(self) -> None:
        pass


@dataclass(slots=True)
class Performance:
    """One call under way in a thread of its own; a lesson has no session."""

    call: Call | Lesson
    tape: Tape = field(default_factory=Tape)
    session: Any = None
    output: Tensor | None = None
    error: BaseException | None = None
    _thread: threading.Thread | None = None

    def start(self, model: PreTrainedModel, on_step: Callable[[int], None]) -> None:
        """Begin; ``on_step`` is rung in the call's own thread."""
        metronome = Metronome(self.tape, on_step)
        options: dict[str, Any] = {}
        if isinstance(self.call, Lesson):
            options["on_step"] = metronome.ring
        else:
            options["stopping_criteria"] = StoppingCriteriaList([metronome])
            if self.call.is_streamable:
                options["streamer"] = Collector(self.tape)
            rows = self.call.ids.shape[0] * self.call.options.get("num_beams", 1)
            length = self.call.ids.shape[1] + self.call.options["max_new_tokens"]
            self.session = model.remote_blocks.open_session(max_length=length, num_rows=rows)
            options["session"] = self.session
        self._thread = threading.Thread(target=self._run, args=(model, options), daemon=True)
        self.tape.began = time.monotonic()
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
    def num_pieces(self) -> int:
        """Pieces of the prefill that have come back; any piece counts once it is traced."""
        hops = self.session.trace.hops
        return max((len(hop.steps) for hop in hops), default=0)

    def _run(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        try:
            self.output = self.call.run(model, **options)
        except BaseException as error:  # told to whoever joins
            self.error = error
