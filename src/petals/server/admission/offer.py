"""What a server serves, and its limits of one request.

Plain values.
"""

from dataclasses import dataclass, field

from petals.models.adapters.low_rank import Slots
from petals.types import BlockSpan, ModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What this server serves, and its limits of one request.

    max_length: tokens per row. max_step_tokens: tokens of one step or pass. max_rows: rows of one
    session. no_training: why it gives no gradients; empty if it does. slots: the matrices to which
    adapters can be applied. kv_format: servers with equal formats can transfer the KV of a session
    to each other; empty: not at all. arithmetic: what decides how sums are rounded.
    """

    model: ModelId
    blocks: BlockSpan
    hidden_size: int
    dtype: str
    max_length: int
    max_step_tokens: int
    max_rows: int
    no_training: str = ""
    slots: Slots = field(default_factory=dict)
    kv_format: str = ""
    arithmetic: str = ""
