"""The parameters of two decisions: which jobs run next, and when a server moves.

Plain values.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy:
    """When servers move to other blocks.

    enough: no server moves while the weakest blocks have this share of the throughput that an even
    distribution would give every block. margin: required relative gain of the swarm per moved share
    of its throughput; at 1.0 a server with a tenth of the throughput must gain 10 %.

    look_seconds: average time between two decisions of one server; in large swarms
    seconds_between_looks * number of servers, if that is longer. confirm_seconds: time until a
    reason to move is checked again; the server moves if it still holds. turn_seconds: additional
    delay for each server with a better move; the server does not move if its delay would exceed
    patience_seconds. min_stay_seconds: shortest time at the same blocks, unless some block of the
    model has no server.
    """

    enough: float = 0.9
    margin: float = 1.0
    look_seconds: float = 60.0
    seconds_between_looks: float = 1.0
    confirm_seconds: float = 60.0
    turn_seconds: float = 60.0
    patience_seconds: float = 600.0
    min_stay_seconds: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a batch.

    latency_budget_seconds: expected duration of a batch, or of a part of a pass, while sessions
    decode; if their steps alone need longer, twice the duration of these. idle_budget_seconds: the
    same while no session decodes. max_batch_tokens: size of a batch. min_chunk_tokens: what a
    prefill or pass gets even if the budget is used up. forward_every: number of batches of sessions
    after which a part of a waiting pass runs.
    """

    latency_budget_seconds: float = 0.1
    idle_budget_seconds: float = 0.5
    max_batch_tokens: int = 1024
    min_chunk_tokens: int = 16
    forward_every: int = 8
