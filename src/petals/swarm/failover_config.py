"""Limits and waiting times of failover, on clients and on servers.

A value is a field if an operator, a test or an experiment may want another one. Times are in
seconds. Knows nothing of what it limits.
"""

from dataclasses import dataclass

SILENCE_SECONDS = 3.0
"""Default for how long (s) a peer may give no sign of life while an answer from it is due. The
default of ``ClientConfig.silence_timeout``, of links between servers and of all other streams.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverConfig:
    """How failures are noticed and repaired. The defaults suit servers on the internet.

    A client's own patience is in ``ClientConfig``: ``silence_timeout``, ``step_timeout`` (called
    *the shortest timeout* here) and ``repair_timeout``.
    """

    check_integrity: bool = False
    """Assert the invariants of a client's session whenever it is idle (tests and experiments). A
    server has ``MemoryConfig.check_integrity``.
    """

    # -- steps of a session (client)
    timeout_factor: float = 4.0
    """A step times out after this many times the median of what such steps took."""
    unmeasured_factor: float = 10.0
    unmeasured_tokens: int = 128
    """While no step was measured, n tokens time out after
    ``unmeasured_factor * shortest timeout * (1 + n / unmeasured_tokens)``.
    """
    hung_seconds: float = 10.0
    hung_factor: float = 4.0
    """A hop that answers pings but not the step is abandoned after
    ``max(hung_seconds, hung_factor * timeout of the step)``, if another server that was measured
    and has room can take its place.
    """
    redial_trips: float = 10.0
    redial_min_seconds: float = 0.3
    redial_max_seconds: float = 1.0
    """A server whose stream broke has ``redial_trips`` one-way delays of its link, between the two
    bounds, to accept a new stream: a connection, its encryption, a stream, a greeting.
    """
    keepalives_per_lease: float = 3.0
    """Signs of life that a client sends within the lease of a server."""
    max_repairs: int = 64
    """Attempts to replace hops without any progress of the step, after which it fails. Waiting for
    servers is limited by ``repair_timeout`` instead.
    """
    close_seconds: float = 2.0
    """Time for a server to confirm that a reservation is freed."""
    jitter_seconds: float = 0.1
    """Upper bound of the random pause between two attempts to reserve crowded servers; without it
    two clients that block each other could retry in step for ever.
    """

    # -- replays and migration (client)
    parts_ahead: int = 8
    """Parts of a replay from the client's own log that a server may have waiting."""
    migration_final_tokens: int = 2
    """Tokens of a row that may be missing at a replacement when it takes over between two steps."""
    migration_max_copies: int = 8
    """Background copies; what is missing after the last is sent between two steps."""
    migration_bytes_per_second: float = 12.5e6
    migration_kv_share: float = 0.25
    """Keys and values are moved if they need at most this share of the time that the old server
    stays, at ``migration_bytes_per_second`` (100 Mbit/s). Hidden states are fewer bytes.
    """
    migration_pause_seconds: float = 0.5
    migration_max_pause_seconds: float = 8.0
    """Pause after a migration that failed; it doubles up to the maximum."""

    # -- choice of servers (client)
    link_retry_seconds: float = 30.0
    """How long a direct link that failed is replaced by the way through the client."""
    max_ban_seconds: float = 3600.0
    """Upper bound of a ban, which doubles with every repetition."""
    straggler_steps: int = 3
    straggler_factor: float = 2.0
    straggler_max_tokens: int = 16
    """A hop is a straggler if each of its last ``straggler_steps`` steps, none of more than
    ``straggler_max_tokens`` tokens, took ``straggler_factor`` times what another server would take
    and what the hop itself announces.
    """
    straggler_look_seconds: float = 1.0
    straggler_rest_seconds: float = 60.0
    """Pause between two comparisons of a hop, and after a hop was left as a straggler."""
    fresh_seconds: float = 1.0
    """Records younger than this are not read again for a block that no server has."""
    spare_rounds: int = 3
    """Rounds in which possible replacements are asked for room; each asks the next best."""
    max_measured: int = 32
    """Servers that are measured at a time."""

    # -- links between servers (server)
    silence_seconds: float = SILENCE_SECONDS
    """How long the next server may give no sign of life while it is due to take a message."""
    epoch_hold_seconds: float = 1.0
    max_held_per_peer: int = 16
    """A message of an epoch that the client has not announced yet is held this long; at most this
    many of one peer.
    """
    max_links: int = 512
    """Open links to next servers."""
    link_dial_seconds: float = 3.0
    link_rest_seconds: float = 1.0
    """Time to open a link; pause before a link that could not be opened is tried again."""
    link_idle_seconds: float = 600.0
    replay_link_idle_seconds: float = 10.0
    """Unused links are closed after this time."""
    max_unconfirmed: int = 1024
    """Messages on a link whose arrival is not confirmed, of which a loss is reported."""
    send_seconds: float = 10.0
    """Base of the time limit of a message in a session, see ``Channel.send``. A peer that does not
    take the message within it loses the stream.
    """
    kv_part_bytes: int = 4 * 1024 * 1024
    """Most bytes that are read from KV memory at once; batches of other sessions wait for it."""
    reaps_per_lease: float = 4.0
    """Searches for sessions with an expired lease within one lease."""
    parting_seconds: float = 2.0
    """Time for the clients of a server that stops to take the notice of it."""
    drain_look_seconds: float = 0.1
    """Pause between two looks at whether the sessions of a draining server have gone."""
