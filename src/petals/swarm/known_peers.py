"""Addresses of members of a swarm, kept on disk, to be dialled when no initial peer answers.

One small file of addresses per swarm, replaced as a whole. It holds no secret, and a member found
through it has to be admitted like any other. Must not know the network.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from petals.logs import get_logger
from petals.swarm.membership import SwarmKey

logger = get_logger(__name__)

MAX_ADDRESSES = 64
"""Addresses kept of one swarm."""

MAX_FILES = 64
"""Swarms that are kept; the file that was written least recently is deleted first."""

_MAX_ADDRESS_BYTES = 256
"""Longest address that is kept."""

_MAX_FILE_BYTES = MAX_ADDRESSES * (_MAX_ADDRESS_BYTES + 1)


class PeerMemory:
    """The addresses kept of the swarm that these initial peers lead to."""

    def __init__(self, folder: Path, initial_peers: Sequence[str], key: SwarmKey | None) -> None:
        digest = hashlib.sha256(b"petals peers 1\0" + (key.secret if key is not None else b""))
        for address in sorted(set(initial_peers)):
            digest.update(address.encode() + b"\0")
        self._folder = folder
        self._path = folder / f"{digest.hexdigest()[:32]}.txt"

    def read(self) -> tuple[str, ...]:
        """Addresses, the latest first; none if the file is missing or damaged."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_FILE_BYTES + 1).decode("ascii")
        except (OSError, UnicodeDecodeError):
            return ()
        return _bounded(text.split("\n")) if len(text) <= _MAX_FILE_BYTES else ()

    def add(self, addresses: Iterable[str]) -> None:
        """Put addresses before those kept already. A disk that cannot be written is only logged."""
        kept = _bounded([*addresses, *self.read()])
        if not kept:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".new-")
            try:
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write("\n".join(kept))
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise
            self._forget_the_oldest()
        except OSError as error:
            logger.info("addresses of peers could not be kept: %s", error)

    def _forget_the_oldest(self) -> None:
        files = sorted(self._folder.glob("*.txt"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _bounded(addresses: Iterable[str]) -> tuple[str, ...]:
    sound = (
        address
        for address in addresses
        if address.startswith("/")
        and len(address) <= _MAX_ADDRESS_BYTES
        and address.isascii()
        and address.isprintable()
    )
    return tuple(dict.fromkeys(sound))[:MAX_ADDRESSES]
