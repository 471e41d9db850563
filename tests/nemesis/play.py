"""One scene: a fresh client at work, faults at their steps, and everything checked afterwards."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemesis.arena import CLIENT_HOST, Arena, wait_until
from nemesis.schedule import Fault, Phase, Scene, Strike
from nemesis.vitals import OwnHoldings, Watch, own_leaks
from nemesis.workload import (
    PREFILL_CHUNK_TOKENS,
    Lesson,
    Performance,
    Workload,
    make_workload,
)
from petals import AutoDistributedModelForCausalLM
from petals.client.connection.event_loop import bridge
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.errors import PetalsError
from petals.swarm.failover_config import FailoverConfig
from petals.testing.equality import assert_same_tokens
from petals.testing.local_swarm import LocalServer
from petals.types import PeerId

SCENE_SECONDS = 120.0
"""A generation that has not ended by then hangs."""

_BETWEEN_SIGNALS_SECONDS = 0.3
"""Two signals that come together may count as one."""

_GRADIENT_TOLERANCE = 1e-5
_VIEW_SECONDS = 45.0
_WAKE_SECONDS = 30.0


@dataclass(slots=True)
class Outcome:
    """How a scene ended. ``stalls``: per client, its longest gap minus its median gap.

    ``landed``: the faults met the phase under way. ``problems`` is empty if all was well.
    """

    scene: Scene
    stalls: list[float] = field(default_factory=list)
    landed: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Injector:
    """Does what strikes say, once each, and undoes what does not undo itself."""

    def __init__(self, arena: Arena, watch: Watch, performance: Performance) -> None:
        self._arena = arena
        self._watch = watch
        self._performance = performance
        self._undo: list[Callable[[], None]] = []
        self.struck: list[tuple[Strike, float]] = []

    def strike(self, strike: Strike) -> None:
        """Returns when the fault is there."""
        self.struck.append((strike, time.monotonic()))
        arena = self._arena
        match strike.fault:
            case Fault.JOIN:
                arena.grow([self._victim(strike).blocks])
            case Fault.BOOTSTRAP:
                arena.kill_bootstrap()
            case Fault.CLIENT_DAEMON:
                # What it had open before ends by its lease.
                for server in arena.alive():
                    self._watch.excuse(server)
                arena.kill_daemon(os.getpid())
            case Fault.KILL:
                arena.signal(self._victim(strike), signal.SIGKILL)
            case Fault.DRAIN:
                arena.ask_to_leave(self._victim(strike))
            case Fault.LEAVE:
                victim = self._victim(strike)
                arena.ask_to_leave(victim)
                time.sleep(_BETWEEN_SIGNALS_SECONDS)
                arena.signal(victim, signal.SIGTERM, alone=True)
            case Fault.SERVER_DAEMON:
                victim = self._victim(strike)
                self._watch.excuse(victim)
                arena.kill_daemon(victim.pid)
            case Fault.PAUSE | Fault.HANG:
                self._stop(self._victim(strike), alone=strike.fault is Fault.HANG)
            case _:
                self._harm_link(strike)

    def undo(self) -> None:
        """End the faults that last. Idempotent."""
        while self._undo:
            self._undo.pop()()

    def _victim(self, strike: Strike) -> LocalServer:
        """The server of that hop in the session under way."""
        hops = self._hops()
        return self._arena.of(hops[strike.hop % len(hops)])

    def _hops(self) -> list[PeerId]:
        """The session's; in training, whose routes change all the time, one holder of each span."""
        session = self._performance.session
        if session is None:
            holders = {server.blocks: server.peer_id for server in self._arena.alive()}
            return [holders[span] for span in sorted(holders, key=lambda span: span.start)]
        assert wait_until(lambda: session.trace.hops, 10.0, pause=0.001)
        return [hop.peer_id for hop in session.trace.hops]

    def _stop(self, victim: LocalServer, *, alone: bool) -> None:
        self._watch.excuse(victim)
        self._arena.signal(victim, signal.SIGSTOP, alone=alone)
        self._undo.append(lambda: self._arena.signal(victim, signal.SIGCONT))

    def _harm_link(self, strike: Strike) -> None:
        lab, victim = self._arena.lab, self._victim(strike)
        assert lab is not None
        host = self._arena.hosts[victim.peer_id]
        for server in self._arena.alive():
            self._watch.excuse(server)
        self._undo.append(lab.heal)
        match strike.fault:
            case Fault.CUT:
                lab.unplug(host)
            case Fault.ONE_WAY_CUT:
                lab.set_link(host, CLIENT_HOST, one_way=True, down=True)
            case Fault.CUT_LINK:
                hops = self._hops()
                edge = strike.hop % max(1, len(hops) - 1)
                near, far = (self._arena.hosts[peer] for peer in hops[edge : edge + 2])
                lab.set_link(near, far, down=True)
            case Fault.SLOW:
                lab.set_host(host, up="1mbit", down="1mbit", access_ms=100)
            case Fault.LOSS:
                lab.set_host(host, loss=0.05)


class Director:
    """Plays scenes of one model in one arena."""

    def __init__(self, name: str, source: Path, arena: Arena, scale: int = 2) -> None:
        self.name = name
        self.arena = arena
        self.watch = Watch(arena)
        self.local: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32
        ).eval()
        self._source = source
        self._scale = scale
        self._workloads: dict[Phase, Workload] = {}
        self._num_steps: dict[Phase, int] = {}
        self._first_gap: dict[Phase, float] = {}

    def play(self, scene: Scene) -> Outcome:
        """Never raises for what the swarm did wrong: that is in the outcome."""
        outcome = Outcome(scene)
        self.arena.restore()
        own = OwnHoldings.now()
        try:
            with self.client() as model:
                if scene.phase not in self._num_steps:
                    self._rehearse(model, scene.phase, outcome)
                self._perform(model, scene, outcome)
                outcome.problems += self.watch.leaks(manager_of(model))
        except (PetalsError, AssertionError, RuntimeError, OSError) as error:
            outcome.problems.append(_in_short(error))
        outcome.problems += own_leaks(own)
        return outcome

    def settle(self) -> list[str]:
        """What servers still hold when every lease is over."""
        with self.client() as model:
            return self.watch.leaks(manager_of(model), patiently=True)

    @contextmanager
    def client(self) -> Iterator[PreTrainedModel]:
        """A client that has just come and sees all servers."""
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(self._source),
            initial_peers=list(self.arena.meeting_points),
            dtype=torch.float32,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
            show_route=False,
            failover=FailoverConfig(check_integrity=True),
        )
        manager = manager_of(model)
        try:
            expected = {server.peer_id for server in self.arena.alive()}

            async def seen() -> set[str]:
                view = await manager.access.view()
                await view.refresh()
                records = (await view.records()).records.values()
                return {r.peer_id for r in records if r.state.name == "ONLINE"}

            missing: set[str] = set()

            def all_seen() -> bool:
                missing.clear()
                missing.update(expected - manager.run(seen()))
                return not missing

            if not wait_until(all_seen, _VIEW_SECONDS, pause=0.3):
                unseen = [server for server in self.arena.alive() if server.peer_id in missing]
                places = ", ".join(f"{server.blocks} …{server.peer_id[-6:]}" for server in unseen)
                newest = max(self.arena.alive(), key=lambda server: server.pid)
                raise RuntimeError(
                    f"alive for {_VIEW_SECONDS:.0f} s and not in the directory: {places} "
                    f"(the newest is …{newest.peer_id[-6:]})"
                )
            self.watch.look(manager)
            yield model
        finally:
            manager.shutdown()

    # -- inside --------------------------------------------------------------------------------

    def _workload(self, phase: Phase) -> Workload:
        if phase not in self._workloads:
            self._workloads[phase] = make_workload(self.local, phase, self._scale)
        return self._workloads[phase]

    def _rehearse(self, model: PreTrainedModel, phase: Phase, outcome: Outcome) -> None:
        """The undisturbed run: its tokens, its steps, its time to the first token."""
        workload = self._workload(phase)
        with performing(workload) as performances:
            for performance in performances:
                performance.start(model, lambda step: None)
            _join(performances)
        self._compare(workload, performances, outcome)
        tape = performances[0].tape
        self._num_steps[phase] = len(tape.ended)
        self._first_gap[phase] = tape.gaps[0] if tape.gaps else 0.0

    def _perform(self, model: PreTrainedModel, scene: Scene, outcome: Outcome) -> None:
        workload = self._workload(scene.phase)
        with performing(workload) as performances:
            first = performances[0]
            injector = Injector(self.arena, self.watch, first)
            prompter = Prompter(scene, injector, first, self._num_steps[scene.phase])
            try:
                for performance in performances:
                    rung = prompter.on_step if performance is first else (lambda step: None)
                    performance.start(model, rung)
                if scene.phase is Phase.PREFILL:
                    prompter.watch_prefill()
                _join(performances)
                prompter.finish()
            finally:
                injector.undo()
        self._compare(workload, performances, outcome)
        outcome.landed = _landed(scene, injector, first)
        for performance in performances:
            outcome.stalls.append(self._stall(scene.phase, performance))
        if first.session is not None:
            outcome.notes += [
                f"repaired {repair.blocks} in {repair.stall_seconds:.2f} s: {repair.reason}"
                for repair in first.session.trace.repairs
            ]
        self._await_survivors(manager_of(model))

    def _stall(self, phase: Phase, performance: Performance) -> float:
        gaps = performance.tape.gaps
        if not gaps:
            return 0.0
        first = gaps[0] - self._first_gap[phase]
        later = max(gaps[1:], default=0.0) - performance.tape.step_seconds
        return max(0.0, first, later)

    def _await_survivors(self, manager: RemoteSequenceManager) -> None:
        """A server that was stopped needs a moment to answer again; one that leaves, to go."""
        from nemesis.vitals import holdings

        for server in self.arena.alive():
            wait_until(
                lambda s=server: s not in self.arena.alive() or holdings(manager, s) is not None,
                _WAKE_SECONDS,
                pause=0.2,
            )

    def _compare(
        self, workload: Workload, performances: list[Performance], outcome: Outcome
    ) -> None:
        for number, (performance, answer) in enumerate(zip(performances, workload.answers)):
            who = f"client {number}"
            if performance.is_alive:
                outcome.problems.append(f"{who} hangs:\n{_stacks()}")
            elif performance.error is not None:
                outcome.problems.append(f"{who}: {_in_short(performance.error)}")
            elif performance.output is not None:
                outcome.problems += [
                    f"{who}: {problem}" for problem in self._differences(performance, answer)
                ]

    def _differences(self, performance: Performance, answer: torch.Tensor) -> Iterator[str]:
        output, streamed = performance.output, performance.tape.streamed
        assert output is not None
        if output.shape != answer.shape:
            yield f"tokens lost or doubled: {list(output.shape)} for {list(answer.shape)}"
            return
        if isinstance(performance.call, Lesson):
            error = float((output - answer).norm() / answer.norm())
            if not error <= _GRADIENT_TOLERANCE:
                yield f"gradients differ by {error:.1e}"
            return
        if performance.call.is_streamable and streamed != output[0].tolist():
            yield f"streamed {streamed}, returned {output[0].tolist()}"
        for row, (expected, actual) in enumerate(zip(answer, output)):
            real = performance.call.mask[row].bool() if len(performance.call.mask) > row else None
            start = 0 if real is None else int(real.long().argmax())
            try:
                assert_same_tokens(self.local, expected[start:], actual[start:])
            except AssertionError as error:
                yield f"row {row}: {error}"


class Prompter:
    """Has the strikes happen at their steps."""

    def __init__(
        self, scene: Scene, injector: Injector, performance: Performance, num_steps: int
    ) -> None:
        self._scene = scene
        self._injector = injector
        self._performance = performance
        self._num_steps = num_steps
        self._due = list(scene.strikes)
        self._until: int | None = None
        self._late: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def on_step(self, num_done: int) -> None:
        """In the thread that generates, between two steps."""
        if self._until is not None and num_done >= self._until:
            self._injector.undo()
            self._until = None
        if self._scene.phase is Phase.PREFILL:
            return
        for strike in list(self._due):
            if num_done >= max(2, int(strike.at * self._num_steps)):
                self._due.remove(strike)
                self._do(strike)
                self._until = num_done + strike.lasts

    def watch_prefill(self) -> None:
        """Strike while the prompt's pieces are on their way."""
        columns = self._performance.call.ids.shape[1]
        for strike in list(self._due):
            piece = max(1, int(strike.at * columns / PREFILL_CHUNK_TOKENS))
            wait_until(
                lambda piece=piece: (
                    self._performance.num_pieces >= piece or self._performance.tape.ended
                ),
                SCENE_SECONDS,
                pause=0.0005,
            )
            self._due.remove(strike)
            self._try(strike)

    def finish(self) -> None:
        """Wait for strikes in threads of their own; raise what went wrong in ours."""
        for thread in self._late:
            thread.join(60.0)
        for error in self._errors:
            raise RuntimeError(f"the nemesis itself failed: {error!r}") from error

    def _do(self, strike: Strike) -> None:
        if not strike.delay or strike.fault is Fault.JOIN:
            self._try(strike)
            return
        seconds = strike.delay * self._performance.tape.step_seconds

        def later() -> None:
            time.sleep(seconds)
            self._try(strike)

        thread = threading.Thread(target=later, daemon=True)
        self._late.append(thread)
        thread.start()

    def _try(self, strike: Strike) -> None:
        try:
            self._injector.strike(strike)
        except BaseException as error:  # told by finish, in the thread that plays
            self._errors.append(error)


@contextmanager
def performing(workload: Workload) -> Iterator[list[Performance]]:
    """All calls of a workload; their sessions are closed afterwards."""
    performances = [Performance(call) for call in workload.calls]
    try:
        yield performances
    finally:
        for performance in performances:
            if performance.session is not None and not performance.is_alive:
                with contextlib.suppress(PetalsError):
                    performance.session.close()


def manager_of(model: Any) -> RemoteSequenceManager:
    """The owner of the model's connection."""
    manager: RemoteSequenceManager = model.remote_blocks.runner.manager
    return manager


def _join(performances: list[Performance]) -> None:
    deadline = time.monotonic() + SCENE_SECONDS
    for performance in performances:
        performance.join(deadline)


def _landed(scene: Scene, injector: Injector, performance: Performance) -> bool:
    """Every strike came, before the last step (in a prefill: before the first) had ended."""
    ended = performance.tape.ended
    if not ended or len(injector.struck) < len(scene.strikes):
        return False
    last = ended[0] if scene.phase is Phase.PREFILL else ended[-1]
    return all(at <= last for _, at in injector.struck)


def _in_short(error: BaseException) -> str:
    """An error, its cause, and the last places it came through, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    cause = "" if error.__cause__ is None else f" from {error.__cause__!r}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{cause} at {places}"


def _stacks() -> str:
    """Where the threads of this process and the tasks of its client stand."""
    threads = ["".join(traceback.format_stack(f)[-6:]) for f in sys._current_frames().values()]
    return "\n".join([*threads, *bridge.run(_tasks(), 5.0)])


async def _tasks() -> list[str]:
    return [f"task {task.get_name()}: {_places(task)}" for task in asyncio.all_tasks()]


def _places(task: "asyncio.Task[Any]") -> str:
    """The lines it waits at, from the innermost to the outermost."""
    places, awaited = [], task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " < ".join(reversed(places))
