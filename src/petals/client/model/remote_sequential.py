"""`RemoteSequential`: a model's blocks on the servers, as one `nn.Module` that slices like a list.

It stands where the model keeps its layers (`model.transformer.h`, `model.model.layers`). Called by
a user it runs hidden states through its blocks, as whole sequences or in a session. While a model's
own forward runs, the list has one entry, the `ModelPass` of that forward. Knows no routes, servers
or token ids.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.client.model.hidden_states import ENTRY
from petals.client.model.inference_session import InferenceSession
from petals.client.model.padding import Rows, pack, unpack
from petals.client.routing.sequence_manager import RemoteSequenceManager, SwarmConnection
from petals.client.routing.wire_dtype import wire_dtype_of
from petals.client.session.rows import SessionRows
from petals.client.session.types import Tuning
from petals.client.training.autograd import run_whole
from petals.client.training.hop_call import PassCall, PassOutput
from petals.client.tuning.lora import RemoteLora
from petals.errors import BadInput, ConfigError, NotSupported
from petals.types import BlockSpan
from petals.wire.tensors import narrowed


@dataclass(frozen=True, slots=True)
class BlockRunner:
    """The two calls that leave the world of modules; tests put blocks of their own process here.

    open_rows: called like `SessionRows`, with (access, blocks, max_length=, num_rows=, tuning=).
    run_whole: called like `client.training.autograd.run_whole`, with (access, blocks, hidden,
    call).
    """

    open_rows: Callable[..., SessionRows]
    run_whole: Callable[[SwarmConnection, BlockSpan, Tensor, PassCall], PassOutput]


IN_SWARM = BlockRunner(SessionRows, run_whole)

_scopes: ContextVar[tuple[tuple["RemoteSequential", object], ...]] = ContextVar(
    "remote_scopes", default=()
)
"""The `with` blocks of this thread or task, innermost last: of which blocks, and the
InferenceSession that calls continue (None: they continue none) or the ModelPass that is the model's
only layer."""

_entered: list[tuple["RemoteSequential", "InferenceSession"]] = []
"""The sessions of the `with` blocks of all threads and tasks, and of which blocks they are."""


class RemoteSequential(nn.Module):
    """The blocks of ``sequence_manager``, or blocks [start_block, end_block) of it.

    ``h[2:5]``, ``h[3]``, ``len(h)`` and iteration work as on a list of layers; a slice is a
    RemoteSequential of its own. ``config`` is the model's config with the fields of ClientConfig
    (as `AutoDistributedConfig` gives it); without a manager one is made from it and from ``dht``
    (see RemoteSequenceManager). Raises ConfigError for a manager together with one of ``dht``,
    ``start_block`` and ``end_block``, which it decides itself.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        sequence_manager: RemoteSequenceManager | None = None,
        dht: object = None,
        start_block: int | None = None,
        end_block: int | None = None,
        runner: BlockRunner = IN_SWARM,
    ) -> None:
        super().__init__()
        if sequence_manager is None:
            span = _span_of(config, start_block, end_block)
            sequence_manager = RemoteSequenceManager(config, span, dht=dht)
        elif any(given is not None for given in (dht, start_block, end_block)):
            raise ConfigError(
                "dht, start_block and end_block have no effect on a given sequence_manager.",
                hint="Slice the manager: sequence_manager=manager[2:5].",
            )
        self.config = config
        self.sequence_manager = sequence_manager
        self.runner = runner
        self.lora: RemoteLora | None = None
        """The adapter of sessions opened and sequences run from now on."""
        self.tuple_size = 0
        """Values that the model's own layers return as (hidden, ...); 0: hidden alone."""

    @property
    def blocks(self) -> BlockSpan:
        """Counted from the model's first block."""
        return self.sequence_manager.blocks

    # Blocks as a list

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> "Iterator[RemoteSequential | ModelPass]":
        current = self._current_pass()
        if current is not None:
            return iter((current,))
        return (self._part(block, block + 1) for block in range(len(self)))

    def __getitem__(self, index: int | slice) -> "RemoteSequential | tuple[ModelPass]":
        if isinstance(index, slice):
            current = self._current_pass()
            if current is not None:
                return (current,)
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                raise NotSupported(
                    "Blocks can only be taken in their order, without gaps.",
                    hint="Slice without a stride: h[2:5].",
                )
            return self._part(start, max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index %= len(self)
        return self._part(index, index + 1)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def _part(self, start: int, end: int) -> "RemoteSequential":
        part = RemoteSequential(
            self.config, sequence_manager=self.sequence_manager[start:end], runner=self.runner
        )
        part.tuple_size, part.lora = self.tuple_size, self.lora
        return part

    # Sessions

    @property
    def active_session(self) -> InferenceSession | None:
        """The session that calls in this thread or task continue; None outside any."""
        found = self._session_scopes()
        return found[-1] if found else None

    @property
    def is_in_block(self) -> bool:
        """Whether a `with` block of this thread or task says which session calls continue."""
        return bool(self._session_scopes())

    def session_of_call(self) -> InferenceSession | None:
        """The session that a call made now continues; None for a call of its own.

        A thread, or a task that was begun earlier, does not inherit the `with` block of another
        one. If such a block is open, it is unknown whether the call belongs to that session, and
        either guess gives a wrong text without an error. Raises NotSupported.
        """
        found = self._session_scopes()
        if not found and any(owner is self for owner, _ in list(_entered)):
            raise NotSupported(
                "A session is open in another thread or task, and this call, made outside its "
                "`with` block, does not say whether it continues it.",
                hint="Continue it with generate(..., session=session) or `with "
                "model.use_session(session):`; run apart from it inside `with "
                "model.use_session(None):`.",
            )
        return found[-1] if found else None

    def _session_scopes(self) -> list[InferenceSession | None]:
        return [
            scope
            for owner, scope in _scopes.get()
            if owner is self and (scope is None or isinstance(scope, InferenceSession))
        ]

    @property
    def position(self) -> int:
        """Tokens in the longest row of the active session; 0 without one."""
        session = self.active_session
        return session.position if session is not None else 0

    @contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Calls inside the block continue ``session``, which stays open; with None, no session."""
        if session is None:
            with self.entered(None):
                yield None
            return
        entry = (self, session)
        _entered.append(entry)
        try:
            with self.entered(session):
                yield session
        finally:
            _entered.remove(entry)

    @contextmanager
    def inference_session(
        self,
        *,
        max_length: int | None = None,
        num_rows: int | None = None,
        prompts: Tensor | None = None,
    ) -> Iterator[InferenceSession]:
        """Open a session, let calls inside the block continue it, and close it.

        max_length: most tokens per row; without it memory is reserved as rows grow, and a full
        server may refuse a step with CacheFull. prompts: see ``open_session``.
        """
        session = self.open_session(max_length=max_length, num_rows=num_rows, prompts=prompts)
        with session, self.use_session(session):
            yield session

    def open_session(
        self,
        *,
        max_length: int | None = None,
        num_rows: int | None = None,
        prompts: Tensor | None = None,
    ) -> InferenceSession:
        """A session of these blocks; close it after use.

        prompts: [blocks, P, H], added to positions 0 to P-1 of every row at the input of each
        block. Raises BadInput for prompts of another shape.
        """
        if prompts is not None:
            _check_prompts(prompts, (len(self), *prompts.shape[1:2]))
            prompts = prompts.detach() if prompts.numel() else None
        adapter = None if self.lora is None else self.lora.snapshot().within(self.blocks)
        return InferenceSession(
            self.sequence_manager,
            max_length,
            num_rows=num_rows,
            tuning=Tuning(self.blocks.start, prompts, adapter),
            open_rows=self.runner.open_rows,
        )

    # Running

    def forward(
        self,
        inputs: Tensor,
        *args: object,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Hidden states [batch, tokens, H] -> the same shape, after these blocks.

        In a session the tokens continue it, without gradients; outside they are whole sequences,
        and the result is differentiable with respect to inputs and prompts. prompts: [blocks, 1 or
        batch, P, H], added to the first P tokens at the input of each block; those of a session are
        given when it opens. hypo_ids: see ``InferenceSession.step``. Raises BadInput for other
        shapes, NotSupported for gradients of a session, and the errors of the swarm.
        """
        _check_hidden(inputs)
        session = self.session_of_call()
        if session is not None:
            _refuse_gradients(inputs)
            return session.step(inputs, prompts=prompts, hypo_ids=hypo_ids)
        return ModelPass(self, Rows.full(*inputs.shape[:2]), prompts=prompts).run_whole(inputs)

    @contextmanager
    def entered(self, scope: "InferenceSession | ModelPass | None") -> Iterator[None]:
        """Calls inside the block, in this thread or task, continue a session or none, or are one
        pass.

        In a pass, this list has the pass as its only entry.
        """
        token = _scopes.set((*_scopes.get(), (self, scope)))
        try:
            yield
        finally:
            _scopes.reset(token)

    @property
    def is_in_pass(self) -> bool:
        """Whether a model's own forward runs around this call, in this thread or task."""
        return self._current_pass() is not None

    def _current_pass(self) -> "ModelPass | None":
        for owner, scope in reversed(_scopes.get()):
            if owner is self and isinstance(scope, ModelPass):
                return scope
        return None


@dataclass(frozen=True, slots=True, eq=False)
class ModelPass:
    """All blocks as the one layer of a model's own forward, for the rows of that call.

    With a session its columns are continued. Without one whole sequences run, with ``prompts``
    [blocks, 1 or rows, P, H]; the outputs of the blocks that are keys of ``tapped`` are stored
    there, [rows, columns, H], and the input of the first block under ENTRY.
    """

    blocks: RemoteSequential
    rows: Rows
    session: InferenceSession | None = None
    prompts: Tensor | None = None
    tapped: dict[int, Tensor | None] = field(default_factory=dict)

    def __call__(
        self, hidden: Tensor, *args: object, **kwargs: object
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states [rows, columns, H] -> the same shape, as the model's layers return them."""
        _check_hidden(hidden)
        if self.session is None:
            output = self.run_whole(hidden)
        else:
            _refuse_gradients(hidden)
            output = self.session.step_columns(hidden, self.rows).to(hidden)
        size = self.blocks.tuple_size
        return (output, *(None,) * (size - 1)) if size else output

    def run_whole(self, hidden: Tensor) -> Tensor:
        """Run the rows as whole sequences, differentiably. Raises BadInput for wrong prompts."""
        blocks, real, prompts = self.blocks, self.rows.real, self.prompts
        if prompts is not None:
            rows = 1 if prompts.ndim == 4 and prompts.shape[1] == 1 else len(real)
            _check_prompts(prompts, (len(blocks), rows, *prompts.shape[2:3]))
            prompts = prompts if prompts.numel() else None
        call = PassCall(
            counts=self.rows.lengths,
            prompts=prompts,
            adapter=None if blocks.lora is None else blocks.lora.live().within(blocks.blocks),
            taps=tuple(block for block in self.tapped if block != ENTRY),
        )
        if ENTRY in self.tapped:
            self.tapped[ENTRY] = hidden
        manager, packed = blocks.sequence_manager, pack(hidden, real)
        wire_dtype = wire_dtype_of(manager, "rpc_forward")
        if wire_dtype is not None:
            packed = narrowed(packed, wire_dtype)
        output = blocks.runner.run_whole(manager.access, blocks.blocks, packed, call)
        for block, tapped in output.tapped.items():
            self.tapped[block] = unpack(tapped, real).to(hidden)
        return unpack(output.hidden, real).to(hidden)


def _span_of(config: PretrainedConfig, start: int | None, end: int | None) -> BlockSpan:
    """Blocks [start, end) of the model, by default all. Raises ConfigError if it has fewer."""
    num_blocks = config.get_text_config(decoder=True).num_hidden_layers
    span = BlockSpan(start or 0, num_blocks if end is None else end)
    if span.end > num_blocks:
        raise ConfigError(
            f"The model has blocks 0:{num_blocks}, not {span}.",
            hint=f"Choose start_block and end_block inside 0:{num_blocks}.",
        )
    return span


def _check_hidden(inputs: Tensor) -> None:
    if inputs.ndim != 3 or not inputs.is_floating_point():
        raise BadInput(
            f"Blocks take floating hidden states [batch, tokens, hidden], "
            f"not {inputs.dtype} {tuple(inputs.shape)}.",
            hint="Embed token ids first: model.get_input_embeddings()(input_ids).",
        )


def _refuse_gradients(inputs: Tensor) -> None:
    if torch.is_grad_enabled() and inputs.requires_grad:
        raise NotSupported(
            "Gradients do not flow through a session.",
            hint="Train on whole sequences, outside a session and with use_cache=False; "
            "generate under torch.no_grad().",
        )


def _check_prompts(prompts: Tensor, shape: tuple[int, ...]) -> None:
    """Raises BadInput unless prompts are floating and of shape (*shape, H)."""
    if prompts.shape[:-1] != shape or not prompts.is_floating_point():
        raise BadInput(
            f"Prompts for {shape[0]} blocks have {prompts.dtype} {tuple(prompts.shape)}.",
            hint="Whole sequences take [blocks, 1 or batch, length, hidden], "
            "sessions [blocks, length, hidden].",
        )
