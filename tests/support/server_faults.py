"""What a real server does wrong to its clients: it refuses, lies, reads nothing, loses steps."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from petals.errors import PetalsError
from petals.swarm.rpc.channel import Channel
from petals.wire.fields import Message
from petals.wire.handshake import Refusal
from petals.wire.messages import AnyMessage
from petals.wire.passes import BackwardResult, ForwardResult
from petals.wire.replies import ForwardFailed, StepResult
from petals.wire.requests import ReplayPart, Step

M = TypeVar("M", bound=Message)
Said = tuple[Message, Sequence[Tensor]]
"""A message and its tensors."""

Rewrite = Callable[[Message, Sequence[Tensor]], Said]

OUTPUTS = (StepResult, ForwardResult, BackwardResult)
PATIENCE_SECONDS = 20.0


@dataclass(eq=False)
class Faults:
    """Stands between the clients of one server and its service, and does no harm until it is told.

    asked: the messages of clients, in order. refusals: for a type of requests the errors with which
    the next ones are answered. rewrite: changes what the server answers. loses_steps: it reports
    every step as lost. is_reading: while it is not set, no message is read; pings are answered.
    """

    asked: list[AnyMessage] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    refusals: defaultdict[type[Message], list[PetalsError]] = field(
        default_factory=lambda: defaultdict(list)
    )
    rewrite: Rewrite = lambda message, tensors: (
        message,
        tensors,
    )
    on_asked: Callable[[AnyMessage], None] = lambda message: None
    loses_steps: bool = False
    is_reading: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.is_reading.set()

    def all(self, kind: type[M]) -> list[M]:
        """The messages of one type."""
        return [message for message in self.asked if isinstance(message, kind)]

    async def until_asked(self, kind: type[Message], times: int = 1) -> None:
        """Return once so many messages of one type have come."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.all(kind)) >= times)

    def before(
        self, serve: Callable[[Channel], Awaitable[None]]
    ) -> Callable[[Channel], Awaitable[None]]:
        """The same service with the faults before it."""

        async def serve_badly(channel: Channel) -> None:
            self.channels.append(channel)
            receive, send = channel.receive, channel.send

            async def take(timeout: float | None = None) -> tuple[AnyMessage, list[Tensor]]:
                while True:
                    await self.is_reading.wait()
                    message, tensors = await receive(timeout)
                    refusal = await self._refusal(message)
                    if refusal is None:
                        return message, tensors
                    await send(refusal)

            async def answer(
                message: Message, tensors: Sequence[Tensor] = (), timeout: float | None = None
            ) -> None:
                await send(*self.rewrite(message, tensors), timeout)

            channel.receive, channel.send = take, answer  # type: ignore[method-assign]
            await serve(channel)

        return serve_badly

    async def _refusal(self, message: AnyMessage) -> Message | None:
        """What is answered in place of the service."""
        self.asked.append(message)
        self.on_asked(message)
        async with self._news:
            self._news.notify_all()
        if self.loses_steps and isinstance(message, Step):
            return ForwardFailed(message.header)
        errors = self.refusals[type(message)]
        return Refusal.of(errors.pop(0), getattr(message, "header", None)) if errors else None


def computing_for(seconds: float) -> Rewrite:
    """A rewrite of results: the server says that each step took so long, after 1 ms in a queue."""

    def rewrite(message: Message, tensors: Sequence[Tensor]) -> Said:
        if isinstance(message, StepResult):
            times = {"queue_seconds": 0.001, "compute_seconds": seconds}
            message = msgspec.structs.replace(message, **times)
        return message, tensors

    return rewrite


def wrong_outputs(how: str) -> Rewrite:
    """A rewrite of outputs and gradients; how: "narrow", "nan", "half" or "nothing"."""

    def rewrite(message: Message, tensors: Sequence[Tensor]) -> Said:
        return message, spoilt(how, tensors) if isinstance(message, OUTPUTS) else tensors

    return rewrite


def wrong_replays(how: str) -> Rewrite:
    """A rewrite of the rows that are sent to the client; how: as above, or "gap" or "long"."""

    def rewrite(message: Message, tensors: Sequence[Tensor]) -> Said:
        if not isinstance(message, ReplayPart):
            return message, tensors
        match how:
            case "gap":
                starts = tuple(start + 1 for start in message.starts)
                return msgspec.structs.replace(message, starts=starts), tensors
            case "long":
                counts = (message.counts[0] + 1, *message.counts[1:])
                longer = torch.cat([tensors[0][:1], tensors[0]])
                return msgspec.structs.replace(message, counts=counts), (longer,)
            case _:
                return message, spoilt(how, tensors)

    return rewrite


def spoilt(how: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of an answer as no honest server sends them."""
    match how:
        case "narrow":
            return [tensor[:, :-1] for tensor in tensors]
        case "nan":
            return [tensor * torch.nan for tensor in tensors]
        case "half":
            return [tensor.half() for tensor in tensors]
        case "nothing":
            return []
    raise ValueError(how)
