"""What a schedule may do to a simulated swarm, and when: a fault strikes with the n-th message."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import torch
from torch import Tensor

from petals.errors import ERRORS_BY_CODE
from petals.types import PeerId
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.replies import Info, ReplayDone, SessionOpened, StepResult
from petals.wire.requests import Forwarded, ReplayPart
from support.simulation.network import Fate, FateKind, SimNetwork
from support.simulation.servers import COMPUTE_SECONDS, SimServer
from support.simulation.story import Sent

CODES = tuple(sorted(ERRORS_BY_CODE))
LIES = ("narrow", "short", "long", "half", "nan", "twice", "nothing", "shifted", "limits")


class FaultKind(Enum):
    """who, other: numbers of peers (0 is the client); code: number of an error code or of a lie."""

    KILL = "the process of a server dies"
    KILL_SILENTLY = "the machine of a server dies"
    REVIVE = "a dead server starts again"
    PAUSE = "a server stands still for some seconds"
    DRAIN = "a server is asked to stop"
    SLOW = "the steps of a server take some seconds each, for a time"
    DEAF = "a server reads nothing for some seconds"
    FAIL = "the next steps of a server fail in the middle"
    FORGET = "a server ends all sessions"
    BREAK = "the streams between two peers are reset"
    DAEMON = "the daemon of a peer starts anew; others notice the end of streams seconds later"
    STALL_LINK = "a link delivers nothing for some seconds"
    CUT = "a link swallows everything for some seconds"
    REFUSE = "a server answers the next request by a refusal"
    LIE = "the next answer of a server has another size"
    CANCEL = "the user gives the step up"
    CLOSE = "the user closes the session"
    STALL = "the message and all behind it come late"
    LOSE = "the message is lost alone"
    REPEAT = "the message comes twice"
    OVERTAKE = "the message comes behind later ones"


KINDS_OF_MESSAGES = {
    FaultKind.STALL: FateKind.STALLED,
    FaultKind.LOSE: FateKind.LOST,
    FaultKind.REPEAT: FateKind.REPEATED,
    FaultKind.OVERTAKE: FateKind.OVERTAKEN,
}
KINDS_OF_USERS = (FaultKind.CANCEL, FaultKind.CLOSE)
KINDS_THAT_LOSE_NOTHING = (
    FaultKind.DRAIN,
    FaultKind.SLOW,
    FaultKind.FAIL,
    FaultKind.FORGET,
    FaultKind.REFUSE,
    FaultKind.LIE,
    FaultKind.CANCEL,
    FaultKind.CLOSE,
    FaultKind.REPEAT,
)
"""With these alone every reservation is freed at once, not at the end of its lease."""


@dataclass(frozen=True, slots=True)
class Fault:
    """at: messages to come before it strikes, counted from the event before it."""

    kind: FaultKind
    at: int = 0
    who: int = 1
    other: int = 0
    seconds: float = 1.0
    code: int = 0


class FaultInjector:
    """Strikes the faults of a schedule.

    on_user: what to do when the user cancels or closes. num_struck: faults that have happened.
    """

    def __init__(
        self,
        net: SimNetwork,
        client: PeerId,
        servers: Sequence[SimServer],
        on_user: Callable[[FaultKind], None],
    ) -> None:
        self.num_struck: Counter[FaultKind] = Counter()
        self._net = net
        self._peers = [client, *(server.peer_id for server in servers)]
        self._servers = servers
        self._on_user = on_user
        self._armed: list[tuple[int, Fault]] = []
        self._refusals: dict[PeerId, str] = {}
        self._lies: dict[PeerId, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        net.on_send = self._see
        net.rewrite = self._rewrite

    def arm(self, fault: Fault) -> None:
        """Let it strike when ``fault.at`` more messages have been sent."""
        self._armed.append((self._net.num_sent + fault.at, fault))

    async def calm(self) -> None:
        """Undo all that can be undone, and let every server live."""
        self._armed.clear()
        self._refusals.clear()
        self._lies.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._net.heal()
        for server in self._servers:
            server.executor.seconds, server.executor.num_failures = COMPUTE_SECONDS, 0
            self._hear_again(server)
        for server in self._servers:
            await server.ended()
            await server.revive()
        self._net.story.note(self._net.now(), "world", "all servers live, all links work")

    # -- inside

    def _see(self, sent: Sent) -> Fate | None:
        fate = None
        for due, fault in list(self._armed):
            if sent.number > due:
                self._armed.remove((due, fault))
                fate = self._strike(fault) or fate
        return fate

    def _strike(self, fault: Fault) -> Fate | None:
        self.num_struck[fault.kind] += 1
        if fault.kind in KINDS_OF_MESSAGES:
            return Fate(KINDS_OF_MESSAGES[fault.kind], fault.seconds)
        if fault.kind in KINDS_OF_USERS:
            self._note("user", fault.kind.value)
            self._on_user(fault.kind)
        elif fault.kind is FaultKind.DAEMON:
            peer = self._peers[fault.who % len(self._peers)]
            self._note(peer, f"{fault.kind.value} ({fault.seconds:g} s)")
            self._later(fault.seconds, self._net.drop_streams(peer))
        elif fault.kind in (FaultKind.BREAK, FaultKind.STALL_LINK, FaultKind.CUT):
            self._strike_link(fault)
        else:
            server = self._servers[(fault.who - 1) % len(self._servers)]
            self._note(server.peer_id, f"{fault.kind.value} ({fault.seconds:g} s)")
            self._strike_server(server, fault)
        return None

    def _strike_link(self, fault: Fault) -> None:
        peers = self._peers
        one, other = peers[fault.who % len(peers)], peers[fault.other % len(peers)]
        if one == other:
            other = peers[0] if one != peers[0] else peers[1]
        self._note(f"{one}>{other}", f"{fault.kind.value} ({fault.seconds:g} s)")
        match fault.kind:
            case FaultKind.BREAK:
                self._net.break_streams(one, other)
            case FaultKind.STALL_LINK:
                self._net.stall(one, other, fault.seconds)
            case FaultKind.CUT:
                self._net.cut(one, other)
                self._later(fault.seconds, lambda: self._net.mend(one, other))

    def _strike_server(self, server: SimServer, fault: Fault) -> None:
        net, executor = self._net, server.executor
        match fault.kind:
            case FaultKind.KILL:
                server.kill()
            case FaultKind.KILL_SILENTLY:
                server.kill(silently=True)
            case FaultKind.REVIVE:
                self._tasks.add(asyncio.create_task(server.revive()))
            case FaultKind.PAUSE:
                net.pause(server.peer_id)
                self._later(fault.seconds, lambda: net.resume(server.peer_id))
            case FaultKind.DRAIN:
                server.drain(fault.seconds)
            case FaultKind.SLOW:
                executor.seconds = fault.seconds
                self._later(4 * fault.seconds, lambda: setattr(executor, "seconds", 0.005))
            case FaultKind.DEAF:
                server.node.is_deaf = True
                self._later(fault.seconds, lambda: self._hear_again(server))
            case FaultKind.FAIL:
                executor.num_failures = 1 + fault.code % 2
            case FaultKind.FORGET:
                self._tasks.add(asyncio.create_task(server.service.sessions.end_all("Forgotten.")))
            case FaultKind.REFUSE:
                self._refusals[server.peer_id] = CODES[fault.code % len(CODES)]
            case FaultKind.LIE:
                self._lies[server.peer_id] = LIES[fault.code % len(LIES)]

    def _hear_again(self, server: SimServer) -> None:
        server.node.is_deaf = False
        for channel in list(self._net.channels):
            channel.wake()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        async def work() -> None:
            await self._net.clock.sleep(seconds)
            action()

        self._tasks.add(asyncio.create_task(work()))

    def _note(self, who: str, what: str) -> None:
        self._net.story.note(self._net.now(), who, what.upper())

    # -- servers that say something else

    def _rewrite(
        self, source: PeerId, message: Message, tensors: Sequence[Tensor]
    ) -> tuple[Message, Sequence[Tensor]]:
        if source in self._refusals and isinstance(
            message, StepResult | ReplayDone | ReplayPart | SessionOpened
        ):
            code = self._refusals.pop(source)
            self._note(source, f"answers {type(message).__name__} by {code}")
            return Refusal(code, "I will not.", "", message.header), ()
        lie = self._lies.get(source)
        if lie is not None:
            told = _lied(lie, message, tensors)
            if told is not None:
                del self._lies[source]
                self._note(source, f"lies about {type(message).__name__}: {lie}")
                return told
        return message, tensors


def _lied(
    lie: str, message: Message, tensors: Sequence[Tensor]
) -> tuple[Message, Sequence[Tensor]] | None:
    """The same message with a lie in it; None if there is no such lie about it."""
    if isinstance(message, Info) and lie == "limits":
        return msgspec.structs.replace(message, max_batch_tokens=1, hidden_size=2), ()
    if isinstance(message, Info) and lie == "narrow":
        return msgspec.structs.replace(message, hidden_size=1), ()
    if isinstance(message, SessionOpened) and lie == "limits":
        return msgspec.structs.replace(message, lease_seconds=0.0), ()
    if isinstance(message, ReplayPart) and lie in ("short", "long", "shifted"):
        return _lied_part(lie, message), tensors
    is_output = isinstance(message, StepResult | ReplayPart | Forwarded) and len(tensors) == 1
    if not is_output or lie in ("limits", "shifted"):
        return None
    if lie == "half" and isinstance(message, Forwarded):
        return None  # a server takes states of any precision, and the client does not see these
    return message, _lied_states(lie, tensors[0])


def _lied_part(lie: str, part: ReplayPart) -> ReplayPart:
    match lie:
        case "short":
            counts = tuple(max(0, count - 1) for count in part.counts)
            return msgspec.structs.replace(part, counts=counts)
        case "long":
            counts = tuple(count + 1 for count in part.counts)
            return msgspec.structs.replace(part, counts=counts)
        case _:
            starts = tuple(start + 1 for start in part.starts)
            return msgspec.structs.replace(part, starts=starts)


def _lied_states(lie: str, states: Tensor) -> Sequence[Tensor]:
    match lie:
        case "narrow":
            return (states[:, :-1],)
        case "short":
            return (states[:-1],)
        case "long":
            return (torch.cat([states, states]),)
        case "half":
            return (states.half(),)
        case "nan":
            return (states * torch.nan,)
        case "twice":
            return (states, states)
        case _:
            return ()


def seeded_latencies(net: SimNetwork, peers: Sequence[PeerId], seed: int) -> None:
    """Give every link a latency of its own; with seed 0 all are equal."""
    chance = random.Random(seed)
    for one in peers:
        for other in peers:
            seconds = chance.choice((0.001, 0.01, 0.05, 0.05 if seed < 4 else 0.4))
            seconds = seconds if seed else 0.01
            net.latency_seconds[one, other] = seconds
