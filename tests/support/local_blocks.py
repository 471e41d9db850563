"""A test double: the blocks of a whole tiny model in this process, as a client's BlockRunner.

Each step runs its rows again from their beginnings; sessions record the steps that they are sent.
"""

import copy
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from petals.client.config import ClientConfig
from petals.client.model.load import distribute, layers_return_tuple
from petals.client.model.remote_sequential import RemoteSequential
from petals.client.routing.sequence_manager import RemoteSequenceManager
from petals.client.session.types import Tuning
from petals.client.training.hop_call import PassOutput
from petals.errors import LengthExceeded, SessionClosed, SessionGap
from petals.models.checkpoint.arch import describe, parent_of
from petals.models.loading.head import HeadKind, class_for
from petals.models.loading.quantize import QuantKind
from petals.models.runtime.batch import Segment
from petals.models.runtime.span import Span
from petals.models.verify.tiny import tiny_config
from petals.types import BlockSpan


class LocalBlocks:
    """Runs consecutive blocks of ``base``, one row at a time and without a cache."""

    def __init__(self, base, arch):
        base = copy.deepcopy(base)  # a span changes how its model attends
        host = base.get_submodule(arch.host_path)
        loaded = SimpleNamespace(
            base=host,
            layers=base.get_submodule(arch.layers_path),
            config=host.config,
            blocks=BlockSpan(0, arch.num_blocks),
            dtype=torch.float32,
            quant=QuantKind.NONE,
        )
        self.span = Span(loaded)
        self.sessions = []  # the sessions that have run a step
        self.errors = {}  # number of a session's step -> the error that it raises, once
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
            outputs = self.run(row, blocks, prompts[number] if prompts else None, call.adapter)
            rows.append(outputs[blocks.end - 1] if len(blocks) else row)
            for block, parts in tapped.items():
                parts.append(outputs[block])
        return PassOutput(
            torch.cat(rows), {block: torch.cat(parts) for block, parts in tapped.items()}
        )

    def run(self, row, blocks, prompts, adapter):
        """The output [n, H] of each block for a whole row; prompts: [blocks, P, H]."""
        row = row.float()
        if not len(row) or not len(blocks):
            return dict.fromkeys(range(blocks.start, blocks.end), row)
        adapter = None if adapter is None else adapter.within(blocks)
        segment = Segment(hidden=row, blocks=blocks, prompts=prompts, adapter=adapter)
        outputs = self.span.trace([segment])[blocks.start : blocks.end]
        return {blocks.start + index: output[0] for index, output in enumerate(outputs)}


class LocalRows:
    """Ragged rows with rollback and reorder, as `SessionRows` has them."""

    def __init__(self, runner, blocks, max_length, tuning):
        self.runner, self.blocks, self.tuning = runner, blocks, tuning
        self.max_length = max_length
        self.inputs, self.lengths = [], ()  # the inputs [n, H] of each row
        self.is_closed = False
        self.steps = []  # (starts, counts, reorder)

    @property
    def is_open(self):
        return bool(self.inputs) and not self.is_closed

    async def step(self, hidden, starts, counts, reorder=None):
        if self.is_closed:
            raise SessionClosed("The session is closed.")
        if len(self.steps) in self.runner.errors:
            raise self.runner.errors.pop(len(self.steps))
        longest = max(start + count for start, count in zip(starts, counts))
        if self.max_length is not None and longest > self.max_length:
            raise LengthExceeded(f"{longest} tokens in a session for {self.max_length}.")
        assert hidden.shape[0] == sum(counts)
        self.steps.append((tuple(starts), tuple(counts), reorder))
        if not self.inputs:
            self.runner.sessions.append(self)
            self.inputs = [hidden[:0]] * len(counts)
        assert reorder is not None or len(self.inputs) == len(counts)
        if reorder is not None:
            self.inputs = [self.inputs[row] for row in reorder]
        outputs = []
        for row, part in enumerate(hidden.split(list(counts))):
            if starts[row] > len(self.inputs[row]):
                raise SessionGap(f"{starts[row]} > {len(self.inputs[row])}")
            self.inputs[row] = torch.cat([self.inputs[row][: starts[row]], part])
            with torch.no_grad():
                made = self.runner.run(
                    self.inputs[row], self.blocks, self.tuning.prompts, self.tuning.adapter
                )
            output = made[self.blocks.end - 1] if len(self.blocks) else self.inputs[row]
            outputs.append(output[starts[row] :])
        self.lengths = tuple(start + count for start, count in zip(starts, counts))
        return torch.cat(outputs)

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
    runner = LocalBlocks(base, arch)
    manager = RemoteSequenceManager(ClientConfig(dht_prefix="tiny"), BlockSpan(0, arch.num_blocks))
    blocks = RemoteSequential(remote.config, sequence_manager=manager, runner=runner)
    blocks.returns_tuple = layers_return_tuple(arch, config)
    setattr(*parent_of(base, arch.layers_path), blocks)
    return local, distribute(remote, arch)


def run_here(remote, folder):
    """Let the blocks of the model in ``folder`` run in this process; returns ``remote``."""
    local = AutoModelForCausalLM.from_pretrained(folder)
    remote.remote_blocks.runner = LocalBlocks(local.base_model, describe(local.config))
    return remote
