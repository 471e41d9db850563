"""`RemoteSequential`: a model's blocks on the servers, as one `nn.Module` that slices like a list.

It stands where the model keeps its layers (`model.transformer.h`, `model.model.layers`). Called by
a researcher it runs hidden states through its blocks, whole or inside a session; called by the
model's own forward it is the only layer and takes rows, padding and cache from the pass that the
model opened. Must not know routes, servers or token ids.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petals.client.block_runner import (
    BlockRunner,
    PassCall,
    PassOutput,
    SessionCall,
    SessionView,
)
from petals.client.model.hidden_states import ENTRY
from petals.client.model.padding import Rows, pack, unpack
from petals.client.model.remote_cache import RemoteCache
from petals.client.model.swarm_runner import SwarmRunner
from petals.client.tuning.lora import RemoteLora
from petals.errors import BadInput, NotSupported
from petals.types import BlockSpan


@dataclass(frozen=True, slots=True, eq=False)
class ModelPass:
    """One forward of a whole model: where its tokens are, and the cache it continues, if any.

    Without a cache whole sequences run, with ``prompts`` [blocks, 1 or rows, P, H]; ``tapped``
    then takes up what the blocks named in it put out, [rows, columns, H], and what enters the
    first one under ENTRY.
    """

    rows: Rows
    cache: RemoteCache | None = None
    prompts: Tensor | None = None
    tapped: dict[int, Tensor | None] = field(default_factory=dict)


_pass: ContextVar[tuple["RemoteSequential", ModelPass] | None] = ContextVar(
    "model_pass", default=None
)
_sessions: ContextVar[tuple[tuple["RemoteSequential", SessionView], ...]] = ContextVar(
    "active_sessions", default=()
)


class RemoteSequential(nn.Module):
    """Blocks [start_block, end_block) of a model that servers hold.

    ``h[2:5]``, ``h[3]``, ``len(h)`` and iteration work as on a list of layers; a slice is a
    RemoteSequential of its own. ``config`` is the model's config with the fields of ClientConfig
    (as `AutoDistributedConfig` gives it). ``dht`` is accepted for old scripts and not used.
    """

    def __init__(
        self,
        config: Any,
        *,
        sequence_manager: Any = None,
        dht: object = None,
        start_block: int | None = None,
        end_block: int | None = None,
        runner: BlockRunner | None = None,
    ) -> None:
        super().__init__()
        if dht is not None:
            warnings.warn(
                "RemoteSequential(dht=...) is not needed any more: the client joins the swarm by "
                "itself, at config.initial_peers.",
                FutureWarning,
                stacklevel=2,
            )
        self.config = config
        self.runner = runner or SwarmRunner.of(config, sequence_manager)
        self.blocks = BlockSpan(
            0 if start_block is None else start_block,
            self.runner.num_blocks if end_block is None else end_block,
        )
        self.lora: RemoteLora | None = None
        """Applied inside these blocks, in sessions opened and sequences run from now on."""
        self.returns_tuple = False
        """How the model's own layers answer: (hidden, ...) in BLOOM's generation, else hidden."""

    @property
    def sequence_manager(self) -> Any:
        """What finds servers for these blocks."""
        return self.runner.sequence_manager(self.blocks)

    # Blocks as a list

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator["RemoteSequential"]:
        if self.is_in_pass:
            yield self  # to the model's own forward all blocks are one layer
            return
        for block in range(len(self)):
            yield self._part(block, block + 1)

    def __getitem__(self, index: int | slice) -> "RemoteSequential":
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                raise NotSupported(
                    "Blocks can only be taken in their order, without gaps.",
                    hint="Slice without a stride: h[2:5].",
                )
            if self.is_in_pass:
                return self
            return self._part(start, max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index %= len(self)
        return self._part(index, index + 1)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def _part(self, start: int, end: int) -> "RemoteSequential":
        offset = self.blocks.start
        part = RemoteSequential(
            self.config,
            start_block=offset + start,
            end_block=offset + end,
            runner=self.runner,
        )
        part.returns_tuple, part.lora = self.returns_tuple, self.lora
        return part

    # Sessions

    @property
    def active_session(self) -> SessionView | None:
        """The session that calls in this thread or task go to, if one was opened."""
        for owner, session in reversed(_sessions.get()):
            if owner is self:
                return session
        return None

    @property
    def position(self) -> int:
        """Tokens the active session has seen; 0 without one."""
        session = self.active_session
        return session.position if session is not None else 0

    @contextmanager
    def use_session(self, session: SessionView | None) -> Iterator[SessionView | None]:
        """Send calls made inside the block to ``session``; it stays open afterwards."""
        if session is None:
            yield None
            return
        token = _sessions.set((*_sessions.get(), (self, session)))
        try:
            yield session
        finally:
            _sessions.reset(token)

    @contextmanager
    def inference_session(
        self,
        *,
        max_length: int | None = None,
        num_rows: int | None = None,
        prompts: Tensor | None = None,
    ) -> Iterator[SessionView]:
        """Open a session of at most ``max_length`` tokens per row and send calls inside to it.

        Without a length it grows as it goes, and a full server may refuse it in the middle.
        prompts: see ``open_session``.
        """
        session = self.open_session(max_length=max_length, num_rows=num_rows, prompts=prompts)
        try:
            with self.use_session(session):
                yield session
        finally:
            session.close()

    def open_session(
        self,
        *,
        max_length: int | None = None,
        num_rows: int | None = None,
        prompts: Tensor | None = None,
    ) -> SessionView:
        """A session of these blocks; close it after use.

        prompts: [blocks, P, H], added to positions 0 to P-1 of every row on entering each block.
        Raises BadInput for prompts of another shape.
        """
        if prompts is not None:
            self._check_prompts(prompts, (len(self), *prompts.shape[1:2]))
            prompts = prompts.detach() if prompts.numel() else None
        adapter = None if self.lora is None else self.lora.snapshot().within(self.blocks)
        return self.runner.open_session(
            self.blocks,
            SessionCall(max_length=max_length, num_rows=num_rows, prompts=prompts, adapter=adapter),
        )

    # Running

    def forward(
        self, inputs: Tensor, *args: Any, prompts: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor]:
        """Hidden states [batch, tokens, H] -> the same shape, after these blocks.

        In a session they continue it, without gradients; outside they are whole sequences, and the
        result is differentiable with respect to inputs and prompts. prompts: [blocks, 1 or batch,
        P, H], added to the first P tokens on entering each block; those of a session are given when
        it opens. Raises BadInput for other shapes, NotSupported for gradients of a session, and
        what the swarm raises.
        """
        if inputs.ndim != 3 or not inputs.is_floating_point():
            raise BadInput(
                f"Blocks take floating hidden states [batch, tokens, hidden], "
                f"not {inputs.dtype} {tuple(inputs.shape)}.",
                hint="Embed token ids first: model.get_input_embeddings()(input_ids).",
            )
        current = self._current_pass()
        if current is not None:
            outputs = self._run_pass(inputs, current)
            return (outputs,) if self.returns_tuple else outputs
        session = self.active_session
        if session is not None:
            _refuse_gradients(inputs)
            return session.step(inputs, prompts=prompts, hypo_ids=kwargs.get("hypo_ids"))
        everything = Rows.full(*inputs.shape[:2])
        return self._run_whole(inputs, ModelPass(everything, prompts=prompts))

    @contextmanager
    def model_pass(self, call: ModelPass) -> Iterator[None]:
        """While the model's forward runs, be its only layer for these rows."""
        token = _pass.set((self, call))
        try:
            yield
        finally:
            _pass.reset(token)

    @property
    def is_in_pass(self) -> bool:
        """Whether the model's own forward runs around these blocks, in this thread or task."""
        return self._current_pass() is not None

    def _current_pass(self) -> ModelPass | None:
        current = _pass.get()
        return current[1] if current is not None and current[0] is self else None

    def _run_pass(self, hidden: Tensor, current: ModelPass) -> Tensor:
        if current.cache is None:
            return self._run_whole(hidden, current)
        _refuse_gradients(hidden)
        return current.cache.step(hidden, current.rows).to(hidden)

    def _run_whole(self, hidden: Tensor, current: ModelPass) -> Tensor:
        real, prompts = current.rows.real, current.prompts
        if prompts is not None:
            rows = 1 if prompts.ndim == 4 and prompts.shape[1] == 1 else len(real)
            self._check_prompts(prompts, (len(self), rows, *prompts.shape[2:3]))
            prompts = prompts if prompts.numel() else None
        call = PassCall(
            counts=tuple(real.sum(1).tolist()),
            prompts=prompts,
            adapter=None if self.lora is None else self.lora.live().within(self.blocks),
            taps=tuple(block for block in current.tapped if block != ENTRY),
        )
        if ENTRY in current.tapped:
            current.tapped[ENTRY] = hidden
        output: PassOutput = self.runner.run_whole(self.blocks, pack(hidden, real), call)
        for block, tapped in output.tapped.items():
            current.tapped[block] = unpack(tapped, real).to(hidden)
        return unpack(output.hidden, real).to(hidden)

    def _check_prompts(self, prompts: Tensor, shape: tuple[int, ...]) -> None:
        """Raises BadInput unless the leading dimensions are ``shape``, with one more behind."""
        if prompts.shape[:-1] != shape or not prompts.is_floating_point():
            raise BadInput(
                f"Prompts for blocks {self.blocks} have {prompts.dtype} {tuple(prompts.shape)}.",
                hint="Whole sequences take [blocks, 1 or batch, length, hidden], "
                "sessions [blocks, length, hidden].",
            )


def _refuse_gradients(inputs: Tensor) -> None:
    if torch.is_grad_enabled() and inputs.requires_grad:
        raise NotSupported(
            "Gradients do not flow through a session.",
            hint="Train on whole sequences, outside a session and with use_cache=False; "
            "generate under torch.no_grad().",
        )
