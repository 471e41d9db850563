"""Faults at the steps that a scenario names: what to do, and when."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

from chaos.client_run import ClientRun
from chaos.cluster import CLIENT_HOST, Cluster, daemons, wait_until
from chaos.leak_checks import LeakCheck
from chaos.schedule import Fault, FaultKind, Phase, Scenario
from chaos.workload import PREFILL_CHUNK_TOKENS
from petals.testing.local_swarm import LocalServer
from petals.types import PeerId

_BETWEEN_SIGNALS_SECONDS = 0.3
"""Pause between two SIGTERMs; signals that are pending together may be delivered as one."""

_PREFILL_SECONDS = 120.0
"""Longest wait for a chunk of the prefill; the scenario's own limit ends a hanging prefill."""


class FaultInjector:
    """Does what faults say, once each, and undoes those that do not end by themselves."""

    def __init__(self, cluster: Cluster, leak_check: LeakCheck, run: ClientRun) -> None:
        self._cluster = cluster
        self._leak_check = leak_check
        self._run = run
        self._undo: list[Callable[[], None]] = []
        self.injected: list[tuple[Fault, float]] = []
        """Faults and the times (monotonic seconds) at which they were injected."""

    def inject(self, fault: Fault) -> None:
        """Returns when the fault is there."""
        self.injected.append((fault, time.monotonic()))
        cluster = self._cluster
        match fault.kind:
            case FaultKind.JOIN:
                cluster.add_servers(self._victim(fault).blocks)
            case FaultKind.BOOTSTRAP:
                cluster.kill_bootstrap()
            case FaultKind.CLIENT_DAEMON:
                # The servers keep what the client held through it until the leases end.
                for server in cluster.alive():
                    self._leak_check.excuse(server)
                _kill_daemons(os.getpid())
            case FaultKind.KILL:
                cluster.kill(self._victim(fault))
            case FaultKind.DRAIN:
                cluster.ask_to_leave(self._victim(fault))
            case FaultKind.LEAVE:
                victim = self._victim(fault)
                cluster.ask_to_leave(victim)
                time.sleep(_BETWEEN_SIGNALS_SECONDS)
                victim.process.signal(signal.SIGTERM, alone=True)
            case FaultKind.SERVER_DAEMON:
                victim = self._victim(fault)
                self._leak_check.excuse(victim)
                _kill_daemons(victim.pid)
            case FaultKind.PAUSE | FaultKind.HANG:
                self._stop(self._victim(fault), alone=fault.kind is FaultKind.HANG)
            case _:
                self._harm_link(fault)

    def undo(self) -> None:
        """End the faults that last. Idempotent."""
        while self._undo:
            self._undo.pop()()

    def _victim(self, fault: Fault) -> LocalServer:
        """The server of that hop in the session under way."""
        hops = self._hops()
        return self._cluster.server(hops[fault.hop % len(hops)])

    def _hops(self) -> list[PeerId]:
        """The session's hops; in training, where routes change often, a replica of each span."""
        session = self._run.session
        if session is None:
            replicas = {server.blocks: server.peer_id for server in self._cluster.alive()}
            return [replicas[span] for span in sorted(replicas, key=lambda span: span.start)]
        assert wait_until(lambda: session.trace.hops, 10.0, pause=0.001)
        return [hop.peer_id for hop in session.trace.hops]

    def _stop(self, victim: LocalServer, *, alone: bool) -> None:
        self._leak_check.excuse(victim)
        victim.process.signal(signal.SIGSTOP, alone=alone)
        self._undo.append(lambda: victim.process.signal(signal.SIGCONT))

    def _harm_link(self, fault: Fault) -> None:
        lab, cluster = self._cluster.lab, self._cluster
        assert lab is not None
        host = cluster.host_of(self._victim(fault).peer_id)
        for server in cluster.alive():
            self._leak_check.excuse(server)
        self._undo.append(lab.heal)
        match fault.kind:
            case FaultKind.CUT:
                lab.unplug(host)
            case FaultKind.ONE_WAY_CUT:
                lab.set_link(host, CLIENT_HOST, one_way=True, down=True)
            case FaultKind.CUT_LINK:
                hops = self._hops()
                edge = fault.hop % max(1, len(hops) - 1)
                near, far = (cluster.host_of(peer) for peer in hops[edge : edge + 2])
                lab.set_link(near, far, down=True)
            case FaultKind.SLOW:
                lab.set_host(host, up="1mbit", down="1mbit", access_ms=100)
            case FaultKind.LOSS:
                lab.set_host(host, loss=0.05)


class FaultTimer:
    """Has the injector inject the faults of a scenario at their steps."""

    def __init__(
        self, scenario: Scenario, injector: FaultInjector, run: ClientRun, num_steps: int
    ) -> None:
        self._scenario = scenario
        self._injector = injector
        self._run = run
        self._num_steps = num_steps
        self._due = list(scenario.faults)
        self._undo_at: int | None = None
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def on_step(self, num_done: int) -> None:
        """In the thread that generates, between two steps."""
        if self._undo_at is not None and num_done >= self._undo_at:
            self._injector.undo()
            self._undo_at = None
        if self._scenario.phase is Phase.PREFILL:
            return
        for fault in list(self._due):
            if num_done >= max(2, int(fault.at * self._num_steps)):
                self._due.remove(fault)
                self._inject_soon(fault)
                self._undo_at = num_done + fault.lasts

    def watch_prefill(self) -> None:
        """Inject the faults of a prefill while its chunks are on their way."""
        columns = self._run.call.ids.shape[1]
        for fault in list(self._due):
            chunk = max(1, int(fault.at * columns / PREFILL_CHUNK_TOKENS))
            wait_until(
                lambda chunk=chunk: self._run.num_chunks >= chunk or self._run.timeline.ended,
                _PREFILL_SECONDS,
                pause=0.0005,
            )
            self._due.remove(fault)
            self._inject(fault)

    def finish(self) -> None:
        """Wait for faults that come with a delay; raise what went wrong in any injection."""
        for thread in self._threads:
            thread.join(60.0)
        for error in self._errors:
            raise RuntimeError(f"a fault could not be injected: {error!r}") from error

    def _inject_soon(self, fault: Fault) -> None:
        if not fault.delay or fault.kind is FaultKind.JOIN:
            self._inject(fault)
            return
        seconds = fault.delay * self._run.timeline.step_seconds

        def later() -> None:
            time.sleep(seconds)
            self._inject(fault)

        thread = threading.Thread(target=later, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _inject(self, fault: Fault) -> None:
        try:
            self._injector.inject(fault)
        except BaseException as error:  # raised by `finish`, in the thread of the runner
            self._errors.append(error)


def _kill_daemons(pid: int) -> None:
    """SIGKILL to the network daemons of a process and to nothing else."""
    for daemon in daemons(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon.kill()
