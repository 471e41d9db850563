"""The faults of a scenario: what each does, and at which step it comes."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from chaos.client_run import ClientRun
from chaos.cluster import CLIENT_HOST, Cluster, daemons, kill_daemons, wait_until
from chaos.laptop import SLEEP_SECONDS, add_on_other_hardware, restart_five_times, sleep_command
from chaos.leak_checks import LeakCheck
from chaos.schedule import ON_NETWORK, Fault, FaultKind, Phase, Scenario
from chaos.workload import PREFILL_CHUNK_TOKENS
from petals.testing.local_swarm import LocalServer
from petals.types import PeerId

_BETWEEN_SIGNALS_SECONDS = 0.3
"""Pause between two SIGTERMs; signals that are pending together may be delivered as one."""

_PREFILL_SECONDS = 120.0
"""Longest wait for a chunk of the prefill; the scenario's own limit ends a hanging prefill."""


class FaultInjector:
    """Injects each fault of a scenario once, at its step; undoes those that would last for ever.

    ``run`` is the client's call that the steps are counted of, and whose hops the faults hit.
    """

    def __init__(self, cluster: Cluster, leak_check: LeakCheck, run: ClientRun) -> None:
        self._cluster = cluster
        self._leak_check = leak_check
        self._run = run
        self._due: list[Fault] = []
        self._undo: list[Callable[[], None]] = []
        self._undo_at: int | None = None
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._sleeping: list[subprocess.Popen[bytes]] = []
        self.injected_at: list[float] = []
        """Times (monotonic seconds) at which faults were injected."""

    def arm(self, scenario: Scenario, num_steps: int) -> Callable[[int], None]:
        """The callback that injects the faults; ``num_steps``: those of the undisturbed run."""
        self._due = list(scenario.faults)

        def on_step(num_done: int) -> None:
            if self._undo_at is not None and num_done >= self._undo_at:
                self.undo()
                self._undo_at = None
            if scenario.phase is Phase.PREFILL:
                return
            for fault in list(self._due):
                if num_done >= max(2, int(fault.at * num_steps)):
                    self._due.remove(fault)
                    self._inject_soon(fault)
                    # A server that changes its address is in use for some steps before.
                    lasts = 4 if fault.kind is FaultKind.ADDRESS else fault.lasts
                    self._undo_at = num_done + lasts

        return on_step

    def watch_prefill(self) -> None:
        """Inject the faults of a prefill while its chunks are under way."""
        columns, run = self._run.call.ids.shape[1], self._run
        for fault in self._due:
            chunk = max(1, int(fault.at * columns / PREFILL_CHUNK_TOKENS))
            wait_until(
                lambda chunk=chunk: run.num_chunks >= chunk or run.timeline.ended,
                _PREFILL_SECONDS,
                pause=0.0005,
            )
            self._inject(fault)

    def finish(self) -> None:
        """Wait for faults that come with a delay or end by themselves; raise what went wrong in any
        injection.
        """
        for sleeping in self._sleeping:
            sleeping.wait(2 * SLEEP_SECONDS)
        for thread in self._threads:
            thread.join(60.0)
        for error in self._errors:
            raise RuntimeError(f"a fault could not be injected: {error!r}") from error

    def undo(self) -> None:
        """End the faults that last. Idempotent."""
        while self._undo:
            self._undo.pop()()

    # -- Inside

    def _inject_soon(self, fault: Fault) -> None:
        if not fault.delay or fault.kind is FaultKind.JOIN:
            self._inject(fault)
            return
        seconds = fault.delay * self._run.timeline.step_seconds
        thread = threading.Timer(seconds, self._inject, [fault])
        thread.daemon = True
        self._threads.append(thread)
        thread.start()

    def _inject(self, fault: Fault) -> None:
        self.injected_at.append(time.monotonic())
        try:
            self._do(fault)
        except BaseException as error:  # raised by `finish`, in the thread of the runner
            self._errors.append(error)

    def _do(self, fault: Fault) -> None:
        """Returns when the fault is there."""
        cluster = self._cluster
        match fault.kind:
            case FaultKind.JOIN:
                cluster.add_servers(self._victim(fault).blocks)
            case FaultKind.BOOTSTRAP:
                cluster.kill_bootstrap()
            case FaultKind.CLIENT_DAEMON:
                # The servers keep what the client held through it until the leases end.
                self._excuse(cluster.alive())
                kill_daemons(os.getpid())
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
                self._excuse([victim])
                kill_daemons(victim.pid)
            case FaultKind.PAUSE | FaultKind.HANG:
                victim = self._victim(fault)
                self._excuse([victim])
                victim.process.signal(signal.SIGSTOP, alone=fault.kind is FaultKind.HANG)
                self._undo.append(lambda: victim.process.signal(signal.SIGCONT))
            case FaultKind.SERVER_SLEEP:
                self._fall_asleep([self._victim(fault)])
            case FaultKind.BOOTSTRAP_SLEEP:
                self._fall_asleep([], [cluster.bootstrap_pid])
            case FaultKind.CLIENT_SLEEP:
                self._fall_asleep([], client=True)
            case FaultKind.LAPTOP_SLEEP:
                self._fall_asleep(cluster.alive(), [cluster.bootstrap_pid], client=True)
            case FaultKind.RESTARTS | FaultKind.RESTARTS_WITH_IDENTITY:
                victim = self._victim(fault)
                self._excuse([victim])
                restart_five_times(
                    cluster, victim, has_identity=fault.kind is FaultKind.RESTARTS_WITH_IDENTITY
                )
            case FaultKind.OTHER_HARDWARE:
                victim = self._victim(fault)
                cluster.kill_span(victim.blocks)
                add_on_other_hardware(cluster, victim.blocks)
            case FaultKind.ADDRESS:
                victim, moving = self._victim(fault), cluster.moving
                assert moving is not None, "see chaos.moving_host"
                cluster.kill_span(victim.blocks)
                cluster.add_on_moving_host(victim.blocks)
                self._undo.append(moving.move)
            case kind:
                assert kind in ON_NETWORK
                self._excuse(cluster.alive())
                self._harm_link(fault)

    def _harm_link(self, fault: Fault) -> None:
        lab, cluster = self._cluster.lab, self._cluster
        assert lab is not None
        host = cluster.host_of(self._victim(fault).peer_id)
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

    def _fall_asleep(
        self, servers: Sequence[LocalServer], groups: Sequence[int] = (), *, client: bool = False
    ) -> None:
        """Stop process groups, and this process with its daemons, for ``SLEEP_SECONDS``."""
        self._excuse(servers or self._cluster.alive())
        groups = [*groups, *(server.pid for server in servers)]
        alone = [os.getpid()] if client else []
        alone += [daemon.pid for pid in (*groups, *alone) for daemon in daemons(pid)]
        self._sleeping.append(subprocess.Popen(sleep_command(groups, alone)))

    def _excuse(self, servers: Sequence[LocalServer]) -> None:
        for server in servers:
            self._leak_check.excuse(server)

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
