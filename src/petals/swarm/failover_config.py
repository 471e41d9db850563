"""Limits and waiting times of failover, on clients and on servers.

A value is a field if an operator, a test or an experiment may want another one. Times are in
seconds. Knows nothing of what it limits.
"""

from dataclasses import dataclass
from typing import Annotated

from petals.settings import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Setting,
    Settings,
    WholeNumber,
)

SILENCE_SECONDS = 3.0
"""Default for how long (s) a peer may give no sign of life while an answer from it is due. The
default of ``ClientConfig.silence_timeout``, of links between servers and of all other streams.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverConfig(Settings):
    """How failures are noticed and repaired. The defaults suit servers on the internet.

    A client's own patience is in ``ClientConfig``: ``silence_timeout``, ``step_timeout`` (called
    *the shortest timeout* here) and ``repair_timeout``.
    """

    check_integrity: Annotated[
        bool,
        Setting(
            "Assert the invariants of a client's session whenever it is idle (tests and "
            "experiments). A server has MemoryConfig.check_integrity."
        ),
    ] = False

    # -- steps of a session (client)
    timeout_factor: Annotated[
        PositiveFloat,
        Setting("A step times out after this many times the median of what such steps took."),
    ] = 4.0
    unmeasured_factor: Annotated[
        PositiveFloat,
        Setting(
            "While no step was measured, n tokens time out after unmeasured_factor x the shortest "
            "timeout x (1 + n / unmeasured_tokens)."
        ),
    ] = 10.0
    unmeasured_tokens: Annotated[PositiveInt, Setting("See unmeasured_factor.")] = 128
    hung_seconds: Annotated[
        PositiveFloat,
        Setting(
            "A hop that answers pings but not the step is abandoned after max(hung_seconds, "
            "hung_factor x timeout of the step), if another server that was measured and has room "
            "can take its place."
        ),
    ] = 10.0
    hung_factor: Annotated[PositiveFloat, Setting("See hung_seconds.")] = 4.0
    redial_trips: Annotated[
        PositiveFloat,
        Setting(
            "A server whose stream broke has this many one-way delays of its link, between "
            "redial_min_seconds and redial_max_seconds, to accept a new stream: a connection, its "
            "encryption, a stream, a greeting."
        ),
    ] = 10.0
    redial_min_seconds: Annotated[PositiveFloat, Setting("See redial_trips.")] = 0.3
    redial_max_seconds: Annotated[PositiveFloat, Setting("See redial_trips.")] = 1.0
    keepalives_per_lease: Annotated[
        PositiveFloat, Setting("Signs of life that a client sends within the lease of a server.")
    ] = 3.0
    min_keepalive_seconds: Annotated[
        PositiveFloat,
        Setting("Least pause between two signs of life, however short the leases are."),
    ] = 0.05
    max_repairs: Annotated[
        WholeNumber,
        Setting(
            "Attempts to replace hops without any progress of the step, after which it fails. "
            "Waiting for servers is limited by repair_timeout instead."
        ),
    ] = 64
    look_again_seconds: Annotated[
        PositiveFloat,
        Setting(
            "Pause between two readings of the directory while no server has the blocks or the "
            "room."
        ),
    ] = 0.5
    close_seconds: Annotated[
        PositiveFloat, Setting("Time for a server to confirm that a reservation is freed.")
    ] = 2.0
    jitter_seconds: Annotated[
        NonNegativeFloat,
        Setting(
            "Upper bound of the random pause between two attempts to reserve crowded servers; "
            "without it two clients that block each other could retry in step for ever."
        ),
    ] = 0.1

    # -- replays and migration (client)
    parts_ahead: Annotated[
        PositiveInt,
        Setting("Parts of a replay from the client's own log that a server may have waiting."),
    ] = 8
    replay_silence_factor: Annotated[
        PositiveFloat,
        Setting(
            "A single hop has at least this many times silence_timeout to answer a replay: if it "
            "is dead, its stream reports that before."
        ),
    ] = 1.5
    migration_final_tokens: Annotated[
        WholeNumber,
        Setting(
            "Tokens of a row that may be missing at a replacement when it takes over between two "
            "steps."
        ),
    ] = 2
    migration_max_copies: Annotated[
        PositiveInt,
        Setting("Background copies; what is missing after the last is sent between two steps."),
    ] = 8
    migration_bytes_per_second: Annotated[
        PositiveFloat,
        Setting(
            "Assumed rate between two servers (100 Mbit/s). Keys and values are moved if, at this "
            "rate, they need at most migration_kv_share of the time that the old server stays; "
            "else hidden states, which are fewer bytes."
        ),
    ] = 12.5e6
    migration_kv_share: Annotated[NonNegativeFloat, Setting("See migration_bytes_per_second.")] = (
        0.25
    )
    migration_pause_seconds: Annotated[
        PositiveFloat,
        Setting(
            "Pause after a migration that failed; it doubles up to migration_max_pause_seconds."
        ),
    ] = 0.5
    migration_max_pause_seconds: Annotated[
        PositiveFloat, Setting("See migration_pause_seconds.")
    ] = 8.0

    # -- choice of servers (client)
    link_retry_seconds: Annotated[
        NonNegativeFloat,
        Setting("How long a direct link that failed is replaced by the way through the client."),
    ] = 30.0
    max_ban_seconds: Annotated[
        PositiveFloat, Setting("Upper bound of a ban, which doubles with every repetition.")
    ] = 3600.0
    misbehaved_factor: Annotated[
        PositiveFloat,
        Setting("A server whose output cannot be right is banned for this many times ban_timeout."),
    ] = 16.0
    straggler_steps: Annotated[
        PositiveInt,
        Setting(
            "A hop is a straggler if each of this many latest steps, none of more than "
            "straggler_max_tokens tokens, took straggler_factor times what another server would "
            "take and what the hop itself announces."
        ),
    ] = 3
    straggler_factor: Annotated[PositiveFloat, Setting("See straggler_steps.")] = 2.0
    straggler_max_tokens: Annotated[PositiveInt, Setting("See straggler_steps.")] = 16
    straggler_look_seconds: Annotated[
        NonNegativeFloat, Setting("Pause between two comparisons of a session's hops.")
    ] = 1.0
    straggler_rest_seconds: Annotated[
        NonNegativeFloat,
        Setting("Time in which no other hop of the same blocks is left as a straggler."),
    ] = 60.0
    fresh_seconds: Annotated[
        NonNegativeFloat,
        Setting("Records younger than this are not read again for a block that no server has."),
    ] = 1.0
    spare_rounds: Annotated[
        WholeNumber,
        Setting(
            "Rounds in which possible replacements are asked for room; each asks the next best."
        ),
    ] = 3
    max_measured: Annotated[WholeNumber, Setting("Servers that are measured at a time.")] = 32

    # -- links between servers (server)
    silence_seconds: Annotated[
        PositiveFloat,
        Setting(
            "How long the next server may give no sign of life while it is due to take a message."
        ),
    ] = SILENCE_SECONDS
    epoch_hold_seconds: Annotated[
        NonNegativeFloat,
        Setting("A message of an epoch that the client has not announced yet is held this long."),
    ] = 1.0
    max_held_per_peer: Annotated[
        WholeNumber, Setting("Most messages of one peer that are held; see epoch_hold_seconds.")
    ] = 16
    max_links: Annotated[PositiveInt, Setting("Open links to next servers.")] = 512
    link_dial_seconds: Annotated[PositiveFloat, Setting("Time to open a link.")] = 3.0
    link_rest_seconds: Annotated[
        NonNegativeFloat,
        Setting("Pause before a link that could not be opened is tried again."),
    ] = 1.0
    link_idle_seconds: Annotated[
        PositiveFloat, Setting("An unused link is closed after this time.")
    ] = 600.0
    replay_link_idle_seconds: Annotated[
        PositiveFloat, Setting("An unused link of replays is closed after this time.")
    ] = 10.0
    max_unconfirmed: Annotated[
        PositiveInt,
        Setting("Messages on a link whose arrival is not confirmed, of which a loss is reported."),
    ] = 1024
    send_seconds: Annotated[
        PositiveFloat,
        Setting(
            "Base of the time limit of a message in a session; the limit is send_seconds + "
            "num_bytes / min_bytes_per_second. A peer that does not take the message within it "
            "loses the stream."
        ),
    ] = 10.0
    kv_part_bytes: Annotated[
        PositiveInt,
        Setting(
            "Most bytes that are read from KV memory at once; batches of other sessions wait for "
            "it."
        ),
    ] = 4 * 1024 * 1024
    reaps_per_lease: Annotated[
        PositiveFloat,
        Setting("Searches for sessions with an expired lease within one lease."),
    ] = 4.0
    parting_seconds: Annotated[
        NonNegativeFloat,
        Setting("Time for the clients of a server that stops to take the notice of it."),
    ] = 2.0
    drain_look_seconds: Annotated[
        PositiveFloat,
        Setting("Pause between two looks at whether the sessions of a draining server have gone."),
    ] = 0.1
