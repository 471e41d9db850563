"""The go-libp2p daemon's control protocol: streams, addresses and connections of the daemon.

Everything that depends on hivemind's ``P2P``, on the daemon's protobuf messages and on its sockets
is in this file (docs/decisions/0001). Must not know records and frames.
"""

import asyncio
import contextlib
import os
import resource
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import base58
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.proto import p2pd_pb2
from hivemind.utils import logging as hivemind_logging
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.multiaddr.codecs import cid

from petals.errors import ConfigError, PeerUnreachable, VersionMismatch
from petals.swarm.address import Address
from petals.swarm.background import BackgroundTasks
from petals.swarm.config import NodeConfig
from petals.swarm.identity import Identity, write_secret
from petals.swarm.libp2p.home import DaemonHome
from petals.swarm.libp2p.process import DaemonProcess
from petals.types import PeerId
from petals.wire import varint

_BUFFER_BYTES = 1024 * 1024
"""Bytes of one stream that are read ahead from the daemon."""

_CLOSE_SECONDS = 1.0
"""Time limit for sending what is queued when a stream is closed."""

_LINGER_SECONDS = 0.3
"""Time for the other side to end a stream first, before this side ends it."""

_MAX_CONTROL_BYTES = 4 * 1024 * 1024
"""Longest message of the daemon that is accepted."""

Accept = Callable[[str, "DaemonStream"], Awaitable[None]]


class DaemonError(PeerUnreachable):
    """The daemon refused a request; the message holds its reason."""


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

    @property
    def is_ready(self) -> bool:
        transport = self._writer.transport
        return not transport.is_closing() and not transport.get_write_buffer_size()

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
                # Over QUIC the daemon's half-close drops what is on its way, for example a
                # refusal: the side that reads the last message closes first.
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
        self._home = DaemonHome()
        self._process = DaemonProcess(self._home.path, self._ended)
        self._server: asyncio.Server | None = None
        self._accept: dict[str, Accept] = {}
        self._inbound = BackgroundTasks()
        self._max_inbound = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._closing = False
        self.has_ended = False
        self.p2p: Any = None

    async def start(self, listen: Sequence[str]) -> None:
        """Start the process and connect to it. Raises ConfigError if it cannot start (a port in
        use, for example).
        """
        if hivemind_logging._current_mode is hivemind_logging.HandlerMode.IN_HIVEMIND:
            # A program that has chosen where hivemind's handler stands keeps its choice.
            hivemind_logging.use_hivemind_log_handler("nowhere")
        # hivemind would write peer ids inside addresses in a form that the daemon cannot read.
        cid.PROTO_NAME_TO_CIDv1_CODEC.clear()
        key_file = self._home.path / "identity"
        if not key_file.exists():
            write_secret(key_file, self._identity.to_bytes())
        await self._process.start(self._config, listen, key_file, self._relays)
        try:
            self.p2p = await _attach(self._process.control)
            self._server = await asyncio.start_unix_server(
                self._on_connection, path=self._home.path / "streams", limit=_BUFFER_BYTES
            )
        except (P2PDaemonError, OSError) as error:
            raise ConfigError(f"The network daemon cannot be spoken to: {error}") from error

    async def close(self) -> None:
        """End the process and wait for its end."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        await self._inbound.close()
        if self.p2p is not None:
            await self.p2p.shutdown()
        await self._process.stop()
        self._home.remove()

    async def addresses(self) -> tuple[str, ...]:
        """The addresses at which the daemon can be reached, as far as it knows, each with
        ``/p2p/<id>``. Empty if the daemon has ended.
        """
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        try:
            response = await self._ask(request)
        except DaemonError:
            return ()
        found = (_readable(address) for address in response.identify.addrs)
        own = self._identity.peer_id
        return tuple(str(Address(text).with_peer(own)) for text in found if text)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Dial a peer. Raises DaemonError."""
        encoded = []
        for address in addresses:
            with contextlib.suppress(ValueError, KeyError, LookupError):
                encoded.append(Multiaddr(str(Address(address).without_peer(peer))).to_bytes())
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(peer=base58.b58decode(peer), addrs=encoded),
        )
        await self._ask(request)

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connections to a peer, and all streams on them. Raises DaemonError."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.DISCONNECT,
            disconnect=p2pd_pb2.DisconnectRequest(peer=base58.b58decode(peer)),
        )
        await self._ask(request)

    async def connections(self) -> list[tuple[PeerId, str]]:
        """Every open connection of the daemon: the peer, and the address of its other end."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [
            (PeerId(base58.b58encode(info.id).decode()), _readable(address))
            for info in response.peers
            for address in info.addrs
        ]

    async def serve(self, protocol: str, accept: Accept) -> None:
        """Pass streams that peers open for ``protocol`` to ``accept``."""
        self._accept[protocol] = accept
        address = Multiaddr(f"/unix{self._home.path}/streams")
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
        try:
            return await asyncio.open_unix_connection(self._process.control, limit=_BUFFER_BYTES)
        except OSError as error:
            raise DaemonError("The network daemon is not running.") from error

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._inbound) >= self._max_inbound:
            writer.transport.abort()  # outbound streams need sockets, too
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


async def _attach(control: Path) -> Any:
    """hivemind's ``P2P`` on a running daemon, its own socket in the daemon's private folder."""

    owner = os.getpid()

    class PrivateP2P(P2P):
        _UNIX_SOCKET_PREFIX = f"/unix{control.parent}/"

        def _terminate(self) -> None:
            # hivemind's finalizer calls this, in a forked child, too: it removes the socket.
            if os.getpid() == owner:
                super()._terminate()

    return await PrivateP2P.replicate(Multiaddr(f"/unix{control}"))


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: "p2pd_pb2.Request"
) -> "p2pd_pb2.Response":
    response = p2pd_pb2.Response()
    try:
        body = request.SerializeToString()
        writer.write(varint.encode(len(body)) + body)
        await writer.drain()
        response.ParseFromString(await _read_delimited(reader))
    except OSError as error:
        raise DaemonError("The network daemon went away.") from error
    if response.type == p2pd_pb2.Response.ERROR:
        raise DaemonError(f"The peer cannot be reached: {response.error.msg}")
    return response


async def _read_delimited(reader: asyncio.StreamReader) -> bytes:
    """The next message of the daemon: its length as a varint, then its bytes."""
    prefix = bytearray()
    try:
        while not varint.is_whole(prefix):
            prefix += await reader.readexactly(1)
        length, _ = varint.decode(prefix)
        if length > _MAX_CONTROL_BYTES:
            raise DaemonError("The network daemon sent an answer that is too long.")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise DaemonError("The network daemon went away.") from error


def _readable(address: bytes) -> str:
    """A binary multiaddress as text; empty if it names a protocol we do not know."""
    try:
        return str(Multiaddr(address))
    except (ValueError, KeyError, LookupError):
        return ""
