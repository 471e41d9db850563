"""A client that sends frames to a server by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petals.swarm.rpc.channel import Channel
from petals.types import BlockSpan, ModelId
from petals.wire.handshake import Refusal
from petals.wire.header import NextHop, RequestHeader
from petals.wire.messages import AnyMessage
from petals.wire.replies import ForwardFailed, SessionEnded, SessionOpened, StepResult
from petals.wire.requests import CloseSession, OpenSession, Step

MODEL = ModelId("tiny")
PATIENCE_SECONDS = 20.0
Answer = tuple[AnyMessage, list[torch.Tensor]]


@dataclass
class Talk:
    """One channel to a server, and one session that it is about, driven by hand."""

    channel: Channel
    blocks: BlockSpan
    session_id: bytes = b"s" * 16
    epoch: int = 0

    @property
    def next_hop(self) -> NextHop:
        return NextHop(self.channel.peer_id, self.session_id)

    def header(self, request_id: int = 0, epoch: int | None = None) -> RequestHeader:
        return RequestHeader(self.session_id, self.epoch if epoch is None else epoch, request_id)

    async def ask(self, message: AnyMessage, *tensors: torch.Tensor) -> Answer:
        await self.channel.send(message, tensors)
        return await self.hear()

    async def hear(self) -> Answer:
        """The next answer. That a link broke is left out: here nobody waits for what it took."""
        while True:
            message, tensors = await self.channel.receive(PATIENCE_SECONDS)
            if not isinstance(message, ForwardFailed):
                return message, tensors

    async def refused(self, message: AnyMessage, *tensors: torch.Tensor) -> Refusal:
        """The refusal, which has the header of the message, if that has one."""
        answer, _ = await self.ask(message, *tensors)
        assert isinstance(answer, Refusal), answer
        assert answer.message
        assert answer.header == getattr(message, "header", None)
        return answer

    def opening(self, rows: int = 1, max_length: int = 64, **changes: object) -> OpenSession:
        fields: dict[str, object] = {
            "header": self.header(),
            "model": MODEL,
            "blocks": (self.blocks.start, self.blocks.end),
            "num_rows": rows,
            "max_length": max_length,
            "dtype": "float32",
        }
        return OpenSession(**{**fields, **changes})

    async def open(self, rows: int = 1, max_length: int = 64, **changes: object) -> SessionOpened:
        opening = self.opening(rows, max_length, **changes)
        answer, _ = await self.ask(opening)
        assert isinstance(answer, SessionOpened), answer
        assert answer.header == opening.header
        return answer

    def message(
        self,
        step_id: int,
        starts: Sequence[int],
        counts: Sequence[int],
        reorder: tuple[int, ...] | None = None,
        next_hops: tuple[NextHop, ...] = (),
    ) -> Step:
        header = self.header(step_id)
        return Step(header, tuple(starts), tuple(counts), reorder, next_hops=next_hops)

    async def step(
        self,
        step_id: int,
        starts: Sequence[int],
        hidden: Sequence[torch.Tensor],
        reorder: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor]:
        """One step; hidden[r]: [n_r, H] -> the same shapes."""
        counts = tuple(len(part) for part in hidden)
        message = self.message(step_id, starts, counts, reorder)
        answer, tensors = await self.ask(message, torch.cat(list(hidden)))
        assert isinstance(answer, StepResult), answer
        assert answer.header == message.header
        return list(tensors[0].split(counts))

    async def close(self) -> None:
        answer, _ = await self.ask(CloseSession(self.header()))
        assert isinstance(answer, SessionEnded)
        await self.channel.close()
