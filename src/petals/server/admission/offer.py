"""What a server serves and the most it takes at once.

Plain values.
"""

from dataclasses import dataclass, field

from petals.models.adapters.low_rank import Slots
from petals.types import BlockSpan, ModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What this server serves, and the most it takes at once.

    max_length: tokens per row. max_step_tokens: tokens of one step or pass. max_rows: sequences of
    one session. no_training: why it gives no gradients; empty if it does. slots: the matrices that
    adapters may be for. kv_format: how the blocks compute and what they keep; empty if keys and
    values cannot be moved to another server.
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
