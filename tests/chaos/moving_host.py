"""A host whose address changes, as a laptop's does that is carried to another network.

Two network namespaces on one wire: this process's own, which must be a new one (``unshare -n``),
and that of the host. Needs root and iproute2.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

ENV_OWN_NETWORK = "CHAOS_OWN_NETWORK"
"""Set in a process that has a network namespace for itself."""

HERE = "10.99.0.1"
_ADDRESSES = ("10.99.0.2", "10.99.0.3")


def in_own_network(words: Sequence[str]) -> int:
    """Run a command in a new network namespace; returns its exit status."""
    if os.geteuid() != 0:
        print("Only root can change addresses: leave ADDRESS out.", file=sys.stderr)
        return 2
    environment = {**os.environ, ENV_OWN_NETWORK: "1"}
    return subprocess.run(["unshare", "-n", *words], env=environment, check=False).returncode


class MovingHost:
    """Context manager: inside, ``command`` runs programs on the host."""

    def __enter__(self) -> Self:
        assert ENV_OWN_NETWORK in os.environ, "the machine's own network must not change"
        self._holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()  # the namespace is there
        self._number = 0
        for line in (
            "link set lo up",
            f"link add near type veth peer name far netns {self._holder.pid}",
            f"addr add {HERE}/24 dev near",
            "link set near up",
        ):
            self._ip(line)
        for line in ("link set lo up", "link set far up", f"addr add {self._address} dev far"):
            self._ip(line, there=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._holder.communicate(timeout=10.0)

    def command(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-n", "--", *words]

    def move(self) -> None:
        """Give the host another address; connections to the old one break without a word."""
        self._ip(f"addr del {self._address} dev far", there=True)
        self._number = 1 - self._number
        self._ip(f"addr add {self._address} dev far", there=True)

    @property
    def _address(self) -> str:
        return f"{_ADDRESSES[self._number]}/24"

    def _ip(self, line: str, there: bool = False) -> None:
        words = ["ip", *line.split()]
        subprocess.run(self.command(words) if there else words, check=True, timeout=10.0)
