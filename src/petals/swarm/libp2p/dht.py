"""The record store on hivemind's Kademlia, inside this process's event loop.

Every request and answer between peers carries a ticket that covers its bytes, so a peer without the
swarm key can neither read nor store; what is stored must be a valid signed record
(``records.check_stored``). Must not know streams.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from cachetools import LRUCache
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthorizerBase, AuthRole, AuthRPCWrapper

from petals.clock import Clock
from petals.errors import AdmissionDenied, BootstrapFailed, RecordInvalid, RequestTooLarge
from petals.logs import get_logger
from petals.swarm.background import BackgroundTasks, gather_bounded
from petals.swarm.config import MIB
from petals.swarm.directory.records import check_stored
from petals.swarm.libp2p.dht_storage import BoundedStorage
from petals.swarm.membership import Admission
from petals.swarm.transport import StoredValue
from petals.types import PeerId

logger = get_logger(__name__)

_CALL_TIMEOUT_SECONDS = 3.0
"""Time limit for one call to a member."""

_STRANGER_SECONDS = 1.0
"""Time limit for the first answer of a member that others name; it may be gone. The effective limit
is min(call timeout, max(this, ``_STRANGER_PINGS`` x the time in which the initial peers answered)).
"""

_STRANGER_PINGS = 8
_MAX_ANSWERED = 20_000
"""Members that are known to have answered."""

_PINGS_AT_ONCE = 32
"""Members that are pinged at the same time when the directory is joined."""

_MAX_STORED_BYTES = 64 * MIB
"""Memory for the records that this peer keeps for others."""

_MAX_HINT_BYTES = MIB
"""Memory for hivemind's cache, which peers may fill, too."""

_MAX_CALL_BYTES = {"rpc_ping": 4096, "rpc_find": 64 * 1024, "rpc_store": 256 * 1024}


class DhtRecords:
    """This peer's part of the distributed dictionary."""

    def __init__(self, admission: Admission, clock: Clock) -> None:
        self._admission = admission
        self._clock = clock
        self._node: Any = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._background = BackgroundTasks()
        self._answered: LRUCache[str, None] = LRUCache(_MAX_ANSWERED)
        self._stranger_seconds = _STRANGER_SECONDS
        self._id = DHTID.generate()

    async def start(self, p2p: Any, only_asks: bool) -> None:
        """Attach to a daemon that was started (again). Records kept for others stay.

        With ``only_asks`` this peer keeps out of other peers' tables.
        """
        previous = self._node
        node = await DHTNode.create(
            p2p=p2p,
            node_id=self._id,
            client_mode=True,  # the guarded handlers are added below
            wait_timeout=_CALL_TIMEOUT_SECONDS,
            record_validator=_SignedRecordValidator(self._clock),
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
        )
        protocol = node.protocol
        protocol.storage = BoundedStorage(_MAX_STORED_BYTES)
        protocol.cache = BoundedStorage(_MAX_HINT_BYTES)
        if previous is not None:
            previous.is_alive = False
            protocol.storage = previous.protocol.storage
        open_stub = super(DHTProtocol, protocol).get_stub  # type: ignore[misc]

        def guarded_stub(peer: Any) -> AuthRPCWrapper:
            self._note_call()
            tickets = _Tickets(self._admission, self._clock, PeerId(peer.to_base58()))
            return AuthRPCWrapper(open_stub(p2p, peer), AuthRole.CLIENT, tickets)

        protocol.get_stub = guarded_stub
        protocol.call_find = partial(self._find_others, protocol.call_find)
        if not only_asks:
            protocol.client_mode = False
            protocol.node_info = dht_pb2.NodeInfo(node_id=self._id.to_bytes())
            await protocol.add_p2p_handlers(
                p2p, _TicketedProtocol(protocol, self._admission, self._clock)
            )
        self._node = node

    async def join(self, peers: Sequence[PeerId]) -> None:
        """Enter the tables of these members and find the neighbours of this peer. Raises
        BootstrapFailed if none answers.
        """
        protocol, began = self._node.protocol, self._clock.monotonic()
        pings = [partial(protocol.call_ping, PeerID.from_base58(peer)) for peer in peers]
        answers = await gather_bounded(pings, _PINGS_AT_ONCE)
        seconds = _STRANGER_PINGS * (self._clock.monotonic() - began)
        self._stranger_seconds = min(_CALL_TIMEOUT_SECONDS, max(_STRANGER_SECONDS, seconds))
        if peers and not any(answer is not None for answer in answers):
            raise BootstrapFailed(
                "The initial peers are there, but their directory does not answer."
            )
        await self._node.find_nearest_nodes([self._id])

    async def close(self) -> None:
        """End the calls under way: hivemind starts tasks that outlive their search."""
        if self._node is not None:
            self._node.is_alive = False
        await self._background.close()
        calls = self._calls - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)

    async def _find_others(self, find: Any, peer: Any, keys: Any) -> Any:
        """The records and members that a peer returns for ``keys``, without this peer itself, at
        which hivemind would end the search. None if the peer does not answer in time.
        """
        name, found = str(peer), None

        async def ask() -> None:
            nonlocal found
            answer = None
            try:
                answer = await find(peer, keys)
            finally:
                self._answered.pop(name, None)
            if answer is not None:
                self._answered[name] = None
                for _, nearest in answer.values():
                    nearest.pop(self._id, None)
            found = answer

        # The call outlives a search that no longer waits for it: a late answer counts next time.
        seconds = None if name in self._answered else self._stranger_seconds
        call = self._background.start(ask(), "asking a member of the directory")
        try:
            await asyncio.wait({call}, timeout=seconds)
        except asyncio.CancelledError:
            call.cancel()
            raise
        return found

    def _note_call(self) -> None:
        task = asyncio.current_task()
        if task is not None and task not in self._calls:
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def store(self, key: str, subkey: str, value: bytes, expires_at: float) -> bool:
        if self._node is None:
            return False
        return bool(await self._node.store(key, value, expires_at, subkey=subkey))

    async def get(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, StoredValue]]:
        found = {}
        if self._node is not None:
            # An infinite expiration makes the search ask all replicas and merge their answers.
            found = await self._node.get_many(keys, sufficient_expiration_time=float("inf"))
        return {key: _values(found.get(key)) for key in keys}


def _values(found: Any) -> dict[str, StoredValue]:
    if found is None or not isinstance(found.value, dict):
        return {}
    return {
        subkey: StoredValue(entry.value, entry.expiration_time)
        for subkey, entry in found.value.items()
        if isinstance(subkey, str) and isinstance(entry.value, bytes)
    }


class _SignedRecordValidator(RecordValidatorBase):
    """Refuses every value that is no signed record of the peer in its subkey."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey = msgspec.msgpack.decode(record.subkey, type=str)
            value = msgspec.msgpack.decode(record.value, type=bytes)
            check_stored(subkey, value, record.expiration_time, self._clock.now())
        except (msgspec.DecodeError, UnicodeDecodeError, RecordInvalid) as error:
            logger.debug("refused a record: %s", error)
            return False
        return True


class _Tickets(AuthorizerBase):
    """The calling side: puts a ticket on the request and checks the ticket of the answer."""

    def __init__(self, admission: Admission, clock: Clock, peer: PeerId) -> None:
        self._admission, self._clock, self._peer = admission, clock, peer

    async def sign_request(self, request: Any, service_public_key: object) -> None:
        _sign(request, self._admission, self._peer, self._clock.now())

    async def validate_response(self, response: Any, request: Any) -> bool:
        try:
            _check(response, self._admission, self._peer, self._clock.now())
        except AdmissionDenied as error:
            logger.debug("peer %s is not of this swarm: %s", self._peer, error)
            return False
        return True

    async def validate_request(self, request: Any) -> bool:
        return False

    async def sign_response(self, response: Any, request: Any) -> None:
        """Only ``_TicketedProtocol`` answers."""


class _TicketedProtocol:
    """The answering side: passes a call to the protocol if the calling peer's ticket is valid."""

    def __init__(self, protocol: Any, admission: Admission, clock: Clock) -> None:
        self._protocol, self._admission, self._clock = protocol, admission, clock

    async def rpc_ping(self, request: Any, context: Any) -> Any:
        return await self._answer("rpc_ping", request, context)

    async def rpc_store(self, request: Any, context: Any) -> Any:
        return await self._answer("rpc_store", request, context)

    async def rpc_find(self, request: Any, context: Any) -> Any:
        return await self._answer("rpc_find", request, context)

    async def _answer(self, method: str, request: Any, context: Any) -> Any:
        caller, now = PeerId(context.remote_id.to_base58()), self._clock.now()
        _check(request, self._admission, caller, now)
        if request.ByteSize() > _MAX_CALL_BYTES[method]:
            raise RequestTooLarge("A call to the directory is too long.")
        response = await getattr(self._protocol, method)(request, context)
        _sign(response, self._admission, caller, now)
        return response


def _sign(message: Any, admission: Admission, verifier: PeerId, now: float) -> None:
    message.auth.signature = b""
    bound = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
    message.auth.signature = admission.issue(verifier, now, bound)


def _check(message: Any, admission: Admission, holder: PeerId, now: float) -> None:
    ticket, message.auth.signature = message.auth.signature, b""
    bound = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
    admission.check(ticket, holder, now, bound)
