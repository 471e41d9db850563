"""Names and numbers that several layers share, and every PETALS_* environment variable.

The environment is read when a function is called, never at import. Must not know torch, the network
or any other part of petals.
"""

import os
import tempfile
from pathlib import Path

import platformdirs

PUBLIC_INITIAL_PEERS: tuple[str, ...] = ()
"""Peers dialled when none are named. Empty: no public swarm is operated."""

ENV_CACHE = "PETALS_CACHE"
"""Folder for converted models, measured throughput, remembered peers and demo data. Default: the
user's cache folder, ``~/.cache/petals`` on Linux; for a user without a home ``petals-cache-UID``
among the temporary files.
"""

ENV_INITIAL_PEERS = "PETALS_INITIAL_PEERS"
"""Addresses of members of the swarm, separated by commas or spaces, for clients and ``petals
status`` where no ``--join`` or ``initial_peers`` is given. Servers join only with ``--join``.
"""

ENV_SWARM_KEY = "PETALS_SWARM_KEY"
"""Key file of a closed swarm; used where no ``--swarm-key`` or ``swarm_key`` is given."""

ENV_MAX_RETRIES = "PETALS_MAX_RETRIES"
"""Further attempts of a client after the first when servers fail; a whole number. Default: 3."""

ENV_LOGGING = "PETALS_LOGGING"
"""``False`` or ``0``: a program that has imported hivemind is not shown the messages of all loggers
when it imports Petals.
"""

DTYPE_NAMES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")


def cache_dir() -> Path:
    """The folder for converted models, measured throughput and keys; PETALS_CACHE moves it."""
    moved = os.environ.get(ENV_CACHE)
    if moved:
        return Path(os.path.expanduser(moved))
    try:
        return Path(platformdirs.user_cache_dir("petals"))
    except RuntimeError:  # no HOME, and a user id without an entry in the user database
        return Path(tempfile.gettempdir()) / f"petals-cache-{os.getuid()}"


def peers_dir() -> Path:
    """The folder where members of swarms are remembered, for when no initial peer answers."""
    return cache_dir() / "peers"


def initial_peers() -> tuple[str, ...]:
    """Addresses from PETALS_INITIAL_PEERS, separated by commas or white space."""
    return tuple(os.environ.get(ENV_INITIAL_PEERS, "").replace(",", " ").split())


def swarm_key_file() -> Path | None:
    """The key file of a closed swarm from PETALS_SWARM_KEY, None when the variable is unset."""
    value = os.environ.get(ENV_SWARM_KEY)
    return Path(value).expanduser() if value else None


def shows_logs() -> bool:
    """Whether logs are shown to programs that use hivemind; False by PETALS_LOGGING=False."""
    return os.environ.get(ENV_LOGGING, "True").lower() not in ("false", "0")


def max_retries() -> int | None:
    """How often a client repeats a failed request, from PETALS_MAX_RETRIES; None: no limit."""
    value = os.environ.get(ENV_MAX_RETRIES, "")
    return int(value) if value.isdigit() else None


def __getattr__(name: str) -> object:
    """`DTYPE_MAP`, which old scripts import from here, without torch until it is asked for."""
    if name != "DTYPE_MAP":
        raise AttributeError(f"module 'petals.constants' has no attribute {name!r}")
    import torch

    return {dtype: getattr(torch, dtype, "auto") for dtype in DTYPE_NAMES}
