"""The go-libp2p daemon as a child process: its binary, its flags, its log, its end.

hivemind's wheel brings the binary; everything that depends on the binary's flags is in this file.
The daemon ends with its parent, even if that is killed. Must not know the control protocol.
"""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE

from petals.errors import ConfigError
from petals.logs import get_logger
from petals.swarm.address import Address
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import NodeConfig

logger = get_logger("petals.p2pd")

_START_SECONDS = 15.0
"""Time limit for the daemon to say that it listens."""

_STOP_SECONDS = 5.0
"""Time limit for the daemon to end after SIGTERM; then it is killed."""

_IDLE_SECONDS = 30
"""The daemon ends if its parent holds no connection to it for this long."""

_LOG_TAIL_LINES = 5
"""Last lines of the daemon's log, quoted when it does not start."""

_READY = "Peer ID:"


class DaemonProcess:
    """One process. ``on_exit`` is called when it has ended, for whatever reason."""

    def __init__(self, home: Path, on_exit: Callable[[], None]) -> None:
        self._control = home / "control"
        self._on_exit = on_exit
        self._tail: deque[str] = deque(maxlen=_LOG_TAIL_LINES)
        self._child: asyncio.subprocess.Process | None = None
        self._tasks = BackgroundTasks()

    @property
    def control(self) -> Path:
        """The daemon's control socket."""
        return self._control

    async def start(
        self, config: NodeConfig, listen: Sequence[str], key_file: Path, relays: Sequence[str]
    ) -> None:
        """Start the process; returns when it listens. Raises ConfigError if it cannot."""
        for address in listen:
            _check_port_is_free(Address(address))
        flags = _flags(config, listen, relays) | {"id": key_file, "listen": f"/unix{self._control}"}
        command = [str(_binary()), *(f"-{name}={value}" for name, value in flags.items())]
        try:
            self._child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Ctrl-C, and a SIGTERM to the whole process group, must not reach the daemon: its
                # parent still needs it for the last messages. It takes both, even if ignored.
                start_new_session=True,
                env={"GOLOG_LOG_LEVEL": "info", **os.environ, "GOLOG_LOG_FMT": "json"},
            )
        except OSError as error:
            raise self._not_started(str(error)) from error
        ready = asyncio.Event()
        self._tasks.start(self._follow(self._child, ready), "the network daemon's log")
        try:
            async with asyncio.timeout(_START_SECONDS):
                await ready.wait()
        except TimeoutError:
            raise self._not_started(f"it did not listen within {_START_SECONDS:g} s") from None
        if self._child.returncode is not None:
            raise self._not_started(" ".join(self._tail) or "it ended at once")

    async def stop(self) -> None:
        """End the process and wait for its end."""
        child = self._child
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await child.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        await self._tasks.close()

    async def _follow(self, child: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """Log the daemon's output; ``ready`` is set when it listens, or has ended."""
        try:
            while line := await _read_line(child.stdout):
                logger.debug("%s", line)
                self._tail.append(line)
                if line.startswith(_READY):
                    ready.set()
            await child.wait()
        finally:
            ready.set()
        self._on_exit()

    @staticmethod
    def _not_started(reason: str) -> ConfigError:
        return ConfigError(
            f"The network daemon could not start: {reason}",
            hint="Check the addresses and ports to listen on; another process may use them.",
        )


async def _read_line(output: asyncio.StreamReader | None) -> str:
    """The next line that is not blank, without its end; empty at the end of the output."""
    while output is not None:
        try:
            line = await output.readline()
        except ValueError:  # longer than the reader's buffer, which drops it
            continue
        text = line.decode(errors="replace").strip()
        if text or not line:
            return text
    return ""


def _binary() -> Path:
    return Path(str(files("hivemind.hivemind_cli") / "p2pd"))


def _flags(config: NodeConfig, listen: Sequence[str], relays: Sequence[str]) -> dict[str, object]:
    flags: dict[str, object] = {
        "hostAddrs": ",".join(listen),
        "dhtClient" if config.client_mode else "dhtServer": 1,
        "autonat": 1,
        "b": 0,
        "connManager": 1,
        "idleTimeout": f"{_IDLE_SECONDS}s",
        "natPortMap": int(config.nat_port_map),
        "relay": int(config.use_relay),
        "relayHopLimit": 0,
        "tls": 1,
        "persistentConnMaxMsgSize": DEFAULT_MAX_MSG_SIZE,
        "autoRelay": int(bool(relays)),
        # Without this flag, finding relays takes minutes instead of a moment.
        "relayDiscovery": 0,
    }
    if config.announce_maddrs:
        flags["announceAddrs"] = ",".join(config.announce_maddrs)
    if relays:
        flags["trustedRelays"] = ",".join(relays)
        # Never "public": a relay with that setting ends circuits after 128 KiB, at random.
        flags["forceReachabilityPrivate"] = 1
    return flags


def _check_port_is_free(address: Address) -> None:
    """Raises ConfigError if another process has the port: the daemon would silently share it."""
    if not address.port:
        return
    family = socket.AF_INET6 if address.is_ip6 else socket.AF_INET
    kind = socket.SOCK_STREAM if address.transport == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"The network daemon could not start: {address} cannot be listened on ({error}).",
                hint="Another process may use the port; petals serve --port N takes another.",
            ) from error
