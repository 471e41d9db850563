"""The numbers that scheduling and moving decide by.

Plain values, checked when they are made; apart from ``server.config``, since pure decisions read
them. Must not know the network.
"""

from dataclasses import dataclass
from typing import Annotated

from petals.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Setting, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePolicy(Settings):
    """When a server leaves its blocks for others that need it more.

    A server looks about once in ``max(look_seconds, number of servers x seconds_between_looks)``.
    It moves if it finds the same reason twice, ``confirm_seconds`` apart, and waits
    ``turn_seconds`` for each server whose move is better, ``patience_seconds`` at most. Both times
    are at most ``look_seconds``. While a block has no server, all three are at most
    ``max(gap_seconds, number of servers x seconds_between_looks)``.
    """

    enough: Annotated[
        NonNegativeFloat,
        Setting(
            "Move only while the swarm carries less than this share of what it would with its "
            "servers spread evenly.",
            "--rebalance-below",
            "SHARE",
        ),
    ] = 0.9
    margin: Annotated[
        NonNegativeFloat,
        Setting(
            "Least gain of a move, relative to the part of the swarm's throughput that moves: at "
            "1.0 a server that is a tenth of the swarm must lift it by 10 %."
        ),
    ] = 1.0
    look_seconds: Annotated[
        PositiveFloat,
        Setting("How often to look for blocks that need it more.", "--rebalance-every", "SECONDS"),
    ] = 60.0
    seconds_between_looks: Annotated[
        NonNegativeFloat, Setting("Mean time between two looks in the whole swarm, at least.")
    ] = 1.0
    gap_seconds: Annotated[
        PositiveFloat,
        Setting(
            "How often to look for blocks without any server, and the longest wait before such a "
            "block is filled, for each server whose move is better."
        ),
    ] = 5.0
    confirm_seconds: Annotated[
        NonNegativeFloat, Setting("Time between finding a reason to move and looking again.")
    ] = 60.0
    turn_seconds: Annotated[
        NonNegativeFloat, Setting("Time to wait for each server whose move would be better.")
    ] = 60.0
    patience_seconds: Annotated[
        NonNegativeFloat, Setting("Longest time to wait for better moves of others.")
    ] = 600.0
    min_stay_seconds: Annotated[
        NonNegativeFloat,
        Setting("Shortest stay at the same blocks, unless a block has no server."),
    ] = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig(Settings):
    """How long a batch may take, and how much it may hold."""

    latency_budget_seconds: Annotated[
        PositiveFloat,
        Setting(
            "Time limit of a batch while a session decodes; max(this, 2 x the time of the decode "
            "steps alone)."
        ),
    ] = 0.1
    idle_budget_seconds: Annotated[
        PositiveFloat,
        Setting("Time limit of a batch without decode steps, and of one unit of a training pass."),
    ] = 0.5
    max_batch_tokens: Annotated[PositiveInt, Setting("Most tokens in one batch.")] = 1024
    min_chunk_tokens: Annotated[
        PositiveInt, Setting("Shortest piece that a prefill is cut into.")
    ] = 16
    forward_every: Annotated[
        PositiveInt,
        Setting("A unit of a training pass runs after this many other batches at the latest."),
    ] = 8
