"""The numbers that scheduling and moving decide by.

Plain values, checked when they are written down.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy:
    """How eager servers are.

    ``enough``: the share of its even level that a swarm must carry to be left alone. ``margin``: by
    which part it must gain, for each part of the swarm's throughput that moves: at 1.0 a server
    that is a tenth of the swarm must lift it by 10 %. Every server looks about once in
    ``look_seconds``, or less often in large swarms: once in ``seconds_between_looks`` somebody
    does. ``confirm_seconds`` after a finding it looks again, and moves if it still holds;
    ``turn_seconds`` later for each server whose move is better, so long as that takes no more than
    ``patience_seconds``. ``min_stay_seconds`` is waived while a block is held by nobody.
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
    """How long a batch may take, and how much it may hold.

    ``latency_budget_seconds`` bounds a batch while somebody decodes (unless the decodes alone need
    longer: then they may take twice their own time); ``idle_budget_seconds`` bounds one that only
    reads prompts, or a unit of a pass. ``forward_every``: after so many batches of others a unit of
    a pass runs, so that passes never starve.
    """

    latency_budget_seconds: float = 0.1
    idle_budget_seconds: float = 0.5
    max_batch_tokens: int = 1024
    min_chunk_tokens: int = 16
    forward_every: int = 8
