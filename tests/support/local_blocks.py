"""A test double: the blocks of a whole tiny model in this process, as a client's BlockRunner.

Each row has an exact cache of its own; sessions record the steps that they are sent.
"""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from petals.client.config import ClientConfig
from petals.client.model.load import distribute
from petals.client.model.remote_sequential import RemoteSequential
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.session.types import Tuning
from petals.client.training.hop_call import PassOutput
from petals.errors import LengthExceeded, SessionClosed, SessionGap
from petals.models.checkpoint.arch import describe, parent_of
from petals.models.loading.head import HeadKind, class_for, layer_tuple_size
from petals.models.runtime.token_log import RowSlices
from petals.models.verify.tiny import tiny_config
from petals.types import BlockSpan


class Captured(Exception):
    pass


class LocalBlocks:
    """Runs consecutive blocks of ``base``, one row at a time, as the model itself does."""

    def __init__(self, base, arch):
        self.host = base.get_submodule(arch.host_path)
        self.layers = base.get_submodule(arch.layers_path)
        self.num_blocks = arch.num_blocks
        is_hybrid = "linear_attention" in (getattr(self.host.config, "layer_types", None) or ())
        self.cache_config = {"config": self.host.config} if is_hybrid else {}
        self.width = self.host.get_input_embeddings().embedding_dim
        self.sessions = []  # the sessions that have run a step
        self.errors = {}  # number of a session's step -> the error that it raises or awaits, once
        self.num_whole = 0

    def open_rows(self, access, blocks, *, max_length=None, num_rows=None, tuning=None):
        rows = LocalRows(self, blocks, max_length, tuning or Tuning())
        rows.lengths = (0,) * (num_rows or 0)
        return rows

    def run_whole(self, access, blocks, hidden, call):
        self.num_whole += 1
        prompts = call.prompts
        if prompts is not None:
            prompts = prompts.expand(-1, len(call.counts), -1, -1).unbind(1)
        rows, tapped = [], {block: [] for block in call.taps}
        for number, row in enumerate(hidden.split(list(call.counts))):
            extras = Extras(prompts[number] if prompts else None, call.adapter)
            rows.append(self.run(row, blocks, self.new_cache(), extras))
            for block, parts in tapped.items():
                parts.append(extras.outputs.get(block, row[:0]))
        return PassOutput(
            torch.cat(rows), {block: torch.cat(parts) for block, parts in tapped.items()}
        )

    def new_cache(self):
        # Without a config no layer drops what left its window, so that every layer can roll back.
        return DynamicCache(**self.cache_config)

    def run(self, hidden, blocks, cache, extras=None):
        """[n, H] -> [n, H], after the tokens in ``cache``."""
        hidden = hidden.float()
        if not len(hidden) or not len(blocks):
            return hidden
        extras = extras or Extras()
        handles = extras.attach(self.layers, blocks, hidden)
        try:
            self.host(
                inputs_embeds=torch.zeros(1, len(hidden), self.width),
                past_key_values=cache,
                use_cache=True,
            )
        except Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return extras.outputs[blocks.end - 1]


@dataclass
class Extras:
    """Hooks for the blocks of one row: prompts [blocks, P, H] from ``start``, an adapter."""

    prompts: torch.Tensor | None = None
    adapter: object | None = None
    start: int = 0
    outputs: dict = field(default_factory=dict)
    """Output of each block, [n, H]."""

    def attach(self, layers, blocks, hidden):
        def enter(block, layer, args, kwargs):
            given = args[0] if args else kwargs["hidden_states"]
            states = self.prompted(hidden if block == blocks.start else given[0], block, blocks)
            if args:
                return (states[None], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": states[None]}

        def leave(block, layer, args, output):
            self.outputs[block] = (output[0] if isinstance(output, tuple) else output)[0]
            if block == blocks.end - 1:
                raise Captured

        handles = []
        for block in range(blocks.start, blocks.end):
            layer = layers[block]
            handles.append(layer.register_forward_pre_hook(partial(enter, block), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(leave, block)))
        adapter = None if self.adapter is None else self.adapter.within(blocks)
        if adapter is not None:
            pairs = zip(adapter.tensors[::2], adapter.tensors[1::2])
            for ((block, path), part), (a, b) in zip(adapter.parts.items(), pairs):
                adapt = partial(_adapt, part.scaling, a, b)
                handles.append(layers[block].get_submodule(path).register_forward_hook(adapt))
        return handles

    def prompted(self, states, block, blocks):
        if self.prompts is None or self.start >= self.prompts.shape[1]:
            return states
        prompt = self.prompts[block - blocks.start, self.start : self.start + len(states)]
        return torch.cat([states[: len(prompt)] + prompt, states[len(prompt) :]])


def _adapt(scaling, a, b, module, args, output):
    return output + scaling * (args[0] @ a.T) @ b.T


class LocalRows:
    """Ragged rows with rollback and reorder, as `SessionRows` has them."""

    def __init__(self, runner, blocks, max_length, tuning):
        self.runner, self.blocks, self.tuning = runner, blocks, tuning
        self.max_length = max_length
        self.caches, self.lengths = [], ()
        self.kept = []  # per row: what has entered the first block
        self.is_closed = False
        self.steps = []  # (starts, counts, reorder)

    @property
    def is_open(self):
        return bool(self.caches) and not self.is_closed

    async def step(self, hidden, starts, counts, reorder=None, rope_lengths=None):
        if self.is_closed:
            raise SessionClosed("The session is closed.")
        if len(self.steps) in self.runner.errors:
            error = self.runner.errors.pop(len(self.steps))
            raise error if isinstance(error, Exception) else await error()
        longest = max(start + count for start, count in zip(starts, counts))
        if self.max_length is not None and longest > self.max_length:
            raise LengthExceeded(f"{longest} tokens in a session for {self.max_length}.")
        assert hidden.shape[0] == sum(counts)
        self.steps.append((tuple(starts), tuple(counts), reorder))
        if not self.caches:
            self.runner.sessions.append(self)
            self.caches = [self.runner.new_cache() for _ in counts]
            self.kept = [hidden[:0] for _ in counts]
        lengths = self.lengths or (0,) * len(counts)
        assert reorder is not None or len(lengths) == len(counts)
        if reorder is not None:
            self.caches = [copy.deepcopy(self.caches[row]) for row in reorder]
            self.kept = [self.kept[row] for row in reorder]
            lengths = tuple(lengths[row] for row in reorder)
        outputs = []
        for row, part in enumerate(hidden.split(list(counts))):
            if starts[row] > lengths[row]:
                raise SessionGap(f"{starts[row]} > {lengths[row]}")
            if starts[row] < lengths[row]:
                self.caches[row].crop(starts[row] - lengths[row])
            extras = Extras(self.tuning.prompts, self.tuning.adapter, starts[row])
            self.kept[row] = torch.cat([self.kept[row][: starts[row]], part])
            with torch.no_grad():
                outputs.append(self.runner.run(part, self.blocks, self.caches[row], extras))
        self.lengths = tuple(start + count for start, count in zip(starts, counts))
        return torch.cat(outputs)

    async def fork(self, max_length=None):
        fork = LocalRows(self.runner, self.blocks, max_length or self.max_length, self.tuning)
        fork.caches, fork.lengths = copy.deepcopy(self.caches), self.lengths
        fork.kept = list(self.kept)
        self.runner.sessions.append(fork)
        return fork

    async def inputs(self, lengths, reorder=None):
        order = range(len(self.kept)) if reorder is None else reorder
        parts = [self.kept[row][:length] for row, length in zip(order, lengths)]
        if not parts:
            return None
        return RowSlices.whole_forward((0,) * len(lengths), lengths, torch.cat(parts))

    async def close(self):
        self.is_closed = True


def tiny_pair(model_type, kind=HeadKind.CAUSAL_LM, **overrides):
    """(the model of transformers, the same with remote blocks, which LocalBlocks runs)."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **overrides)
    arch = describe(config)
    local = class_for(kind, config, arch)(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    remote = copy.deepcopy(local).requires_grad_(False)
    base = remote.base_model
    runner = LocalBlocks(copy.deepcopy(base), arch)
    manager = RemoteSequenceManager(ClientConfig(dht_prefix="tiny"), BlockSpan(0, arch.num_blocks))
    blocks = RemoteSequential(remote.config, sequence_manager=manager, runner=runner)
    blocks.tuple_size = layer_tuple_size(arch, config)
    setattr(*parent_of(base, arch.layers_path), blocks)
    return local, distribute(remote, arch)


def run_here(remote, folder):
    """Let the blocks of the model in ``folder`` run in this process; returns ``remote``."""
    local = AutoModelForCausalLM.from_pretrained(folder)
    remote.remote_blocks.runner = LocalBlocks(local.base_model, describe(local.config))
    return remote
