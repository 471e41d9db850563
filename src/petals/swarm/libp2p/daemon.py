"""The go-libp2p daemon as a child process: start it, talk to it, notice its death.

Everything that depends on hivemind's ``P2P`` and on the daemon's flags and control socket is in
this file. The daemon ends with its parent, even if that is killed. Knows bytes and peer ids; knows
no records and no frames.
"""

import asyncio
import contextlib
import re
import resource
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import base58
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.multiaddr.codecs import cid

from petals.errors import ConfigError, PeerUnreachable, VersionMismatch
from petals.logs import get_logger
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import NodeConfig
from petals.swarm.identity import Identity, write_secret
from petals.types import PeerId

logger = get_logger(__name__)
p2pd_logger = get_logger("petals.p2pd")

_BUFFER_BYTES = 1024 * 1024
_CLOSE_SECONDS = 1.0
_LINGER_SECONDS = 0.3
_PORT = re.compile(r"^/(ip4|ip6)/([^/]+)/(tcp|udp)/(\d+)")
_MAX_CONTROL_BYTES = 4 * 1024 * 1024

Accept = Callable[[str, "DaemonStream"], Awaitable[None]]


class DaemonError(PeerUnreachable):
    """The daemon refused a request; the text says why."""


class DaemonStream:
    """A stream that the daemon pipes through a local socket."""

    def __init__(
        self,
        info: "p2pd_pb2.StreamInfo",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.remote = PeerId(base58.b58encode(info.peer).decode())
        self.remote_address = _readable(info.addr)
        self._reader = reader
        self._writer = writer
        self._wrote_last = False

    async def read_exactly(self, num_bytes: int) -> bytes:
        try:
            data = await self._reader.readexactly(num_bytes)
            self._wrote_last = False
            return data
        except (asyncio.IncompleteReadError, OSError) as error:
            raise self._lost() from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._writer.is_closing():
            self._wrote_last = True
            self._writer.write(data)

    async def drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as error:
            raise self._lost() from error

    async def close(self) -> None:
        if self._writer.is_closing():
            return
        # Half-close first: if both halves end at once, the daemon drops what it still holds.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._writer.drain()
                # Over QUIC the daemon's half-close drops what is on its way, a refusal for
                # example: whoever reads it leaves first.
                if not self._wrote_last or not await self._ends_soon():
                    self._writer.write_eof()
                    await self._read_to_end()
        self._writer.transport.abort()

    async def _ends_soon(self) -> bool:
        """Whether the other side ends the stream by itself."""
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                await self._read_to_end()
        except TimeoutError:
            return False
        return True

    async def _read_to_end(self) -> None:
        while await self._reader.read(_BUFFER_BYTES):
            pass

    def reset(self) -> None:
        self._writer.transport.abort()

    def _lost(self) -> PeerUnreachable:
        return PeerUnreachable("The connection to the peer was lost.", peer_id=self.remote)


class Daemon:
    """One running daemon. ``on_exit`` is called if it ends without having been asked to."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        on_exit: Callable[[], None],
        relays: Sequence[str] = (),
    ) -> None:
        self._config = config
        self._identity = identity
        self._relays = relays
        self._on_exit = on_exit
        self._home = tempfile.TemporaryDirectory(prefix="petals-")
        self._server: asyncio.Server | None = None
        self._accept: dict[str, Accept] = {}
        self._inbound = BackgroundTasks()
        self._max_inbound = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._closing = False
        self.has_ended = False
        self.p2p: Any = None

    @property
    def process_id(self) -> int | None:
        """The daemon's process, None before it starts."""
        return None if self.p2p is None else int(self.p2p._child.pid)

    async def start(self, listen: Sequence[str]) -> None:
        """Start the process and connect to it. Raises ConfigError if it cannot start (a port in
        use, for example).
        """
        for address in listen:
            _check_free(address)
        use_hivemind_log_handler("nowhere")
        # hivemind would write peer ids inside addresses in a form that the daemon cannot read.
        cid.PROTO_NAME_TO_CIDv1_CODEC.clear()
        home = Path(self._home.name)
        key_file = home / "identity"
        if not key_file.exists():
            write_secret(key_file, self._identity.to_bytes())
        config, relays = self._config, list(self._relays)
        try:
            self.p2p = await _daemon_class(home, self._ended).create(
                host_maddrs=list(listen),
                announce_maddrs=list(config.announce_maddrs) or None,
                identity_path=str(key_file),
                check_if_identity_free=False,
                dht_mode="client" if config.client_mode else "server",
                # Never "public": relays that are told so cut circuits at 128 KiB, at random.
                force_reachability="private" if relays else None,
                nat_port_map=config.nat_port_map,
                use_relay=config.use_relay,
                use_auto_relay=bool(relays),
                trusted_relays=relays or None,
            )
            self._server = await asyncio.start_unix_server(
                self._on_connection, path=home / "streams", limit=_BUFFER_BYTES
            )
        except (P2PDaemonError, ValueError, OSError) as error:
            raise ConfigError(
                f"The network daemon could not start: {error}",
                hint="Check the addresses and ports to listen on; another process may use them.",
            ) from error

    async def close(self) -> None:
        """End the process and wait for its end."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        await self._inbound.close()
        if self.p2p is not None:
            await self.p2p.shutdown()
        self._home.cleanup()

    async def addresses(self) -> tuple[str, ...]:
        """What the daemon believes to be reachable at, each with ``/p2p/<id>``. Empty if the daemon
        is gone.
        """
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        try:
            response = await self._ask(request)
        except DaemonError:
            return ()
        found = (_readable(address) for address in response.identify.addrs)
        own = f"/p2p/{self._identity.peer_id}"
        return tuple(a if a.endswith(own) else a + own for a in found if a)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Dial a peer. Raises DaemonError."""
        encoded = []
        for address in addresses:
            with contextlib.suppress(ValueError, KeyError, LookupError):
                encoded.append(Multiaddr(address.removesuffix(f"/p2p/{peer}")).to_bytes())
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(peer=base58.b58decode(peer), addrs=encoded),
        )
        await self._ask(request)

    async def connections(self) -> list[tuple[PeerId, str]]:
        """Every connection the daemon holds: to whom, and the address it leads to."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [
            (PeerId(base58.b58encode(info.id).decode()), _readable(address))
            for info in response.peers
            for address in info.addrs
        ]

    async def serve(self, protocol: str, accept: Accept) -> None:
        """Have streams for ``protocol`` handed to ``accept``."""
        self._accept[protocol] = accept
        address = Multiaddr(f"/unix{self._home.name}/streams")
        await self._ask(
            p2pd_pb2.Request(
                type=p2pd_pb2.Request.STREAM_HANDLER,
                streamHandler=p2pd_pb2.StreamHandlerRequest(
                    addr=address.to_bytes(), proto=[protocol], balanced=False
                ),
            )
        )

    async def open_stream(self, peer: PeerId, protocol: str) -> DaemonStream:
        """A new stream. Raises DaemonError, or VersionMismatch if the peer does not know the
        protocol.
        """
        reader, writer = await self._dial()
        try:
            request = p2pd_pb2.StreamOpenRequest(peer=base58.b58decode(peer), proto=[protocol])
            response = await _exchange(
                reader,
                writer,
                p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request),
            )
        except DaemonError as error:
            writer.transport.abort()
            if "protocols not supported" in str(error):
                raise VersionMismatch(
                    "The peer answers, but it does not speak the protocol of this Petals: it is of "
                    "an old swarm, or of something else.",
                    hint="Swarms of Petals 2 speak another protocol, and no public swarm is "
                    "operated. Start one with `petals swarm up MODEL`, or join one of this version "
                    "by the address it prints: --join ADDR.",
                    peer_id=peer,
                ) from error
            error.peer_id = peer
            raise
        except BaseException:
            writer.transport.abort()
            raise
        return DaemonStream(response.streamInfo, reader, writer)

    async def _ask(self, request: "p2pd_pb2.Request") -> "p2pd_pb2.Response":
        reader, writer = await self._dial()
        try:
            return await _exchange(reader, writer, request)
        finally:
            writer.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.p2p is None:
            raise DaemonError("The network daemon is being started again.")
        path = self.p2p._daemon_listen_maddr.value_for_protocol("unix")
        try:
            return await asyncio.open_unix_connection(path, limit=_BUFFER_BYTES)
        except OSError as error:
            raise DaemonError("The network daemon is not running.") from error

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._inbound) >= self._max_inbound:
            writer.transport.abort()  # sockets are needed for our own streams, too
            return
        self._inbound.start(self._take_in(reader, writer), "a stream from a peer")

    async def _take_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = p2pd_pb2.StreamInfo()
        try:
            info.ParseFromString(await _read_delimited(reader))
        except (DaemonError, OSError):
            writer.transport.abort()
            return
        accept = self._accept.get(info.proto)
        if accept is None:
            writer.transport.abort()
            return
        await accept(info.proto, DaemonStream(info, reader, writer))

    def _ended(self) -> None:
        self.has_ended = True
        if not self._closing:
            self._on_exit()


def _check_free(address: str) -> None:
    """Raises ConfigError if another process has the port: the daemon would silently share it."""
    match = _PORT.match(address)
    if match is None or match[4] == "0":
        return
    family = socket.AF_INET6 if match[1] == "ip6" else socket.AF_INET
    kind = socket.SOCK_STREAM if match[3] == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((match[2], int(match[4])))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"The network daemon could not start: {address} cannot be listened on ({error}).",
                hint="Another process may use the port; choose another with --port.",
            ) from error


def _daemon_class(home: Path, on_exit: Callable[[], None]) -> Any:
    """hivemind's ``P2P`` with a private socket folder, our own flags and our own log."""

    class PetalsDaemon(P2P):
        _UNIX_SOCKET_PREFIX = f"/unix{home}/"

        @staticmethod
        def _make_process_args(*args: str, **kwargs: object) -> list[str]:
            command: list[str] = P2P._make_process_args(*args, **kwargs)
            # Ctrl-C reaches the whole process group; the daemon must outlive our goodbye.
            shield = ["/bin/sh", "-c", 'trap \'\' INT; exec "$0" "$@"']
            # Without this flag, finding relays takes minutes instead of a moment.
            return [*shield, *command, "-relayDiscovery=0"]

        @staticmethod
        def _log_p2pd_message(line: str) -> None:
            p2pd_logger.debug("%s", line)

        async def _read_outputs(self, ready: "asyncio.Future[None]") -> None:
            await super()._read_outputs(ready)
            on_exit()

    return PetalsDaemon


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: "p2pd_pb2.Request"
) -> "p2pd_pb2.Response":
    response = p2pd_pb2.Response()
    try:
        body = request.SerializeToString()
        writer.write(_varint(len(body)) + body)
        await writer.drain()
        response.ParseFromString(await _read_delimited(reader))
    except OSError as error:
        raise DaemonError("The network daemon went away.") from error
    if response.type == p2pd_pb2.Response.ERROR:
        raise DaemonError(f"The peer cannot be reached: {response.error.msg}")
    return response


async def _read_delimited(reader: asyncio.StreamReader) -> bytes:
    length = shift = 0
    try:
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if length > _MAX_CONTROL_BYTES:
            raise DaemonError("The network daemon sent an answer that is too long.")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise DaemonError("The network daemon went away.") from error


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _readable(address: bytes) -> str:
    """A binary multiaddress as text; empty if it names a protocol we do not know."""
    try:
        return str(Multiaddr(address))
    except (ValueError, KeyError, LookupError):
        return ""
