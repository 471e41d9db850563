"""Which files of the package run code while something happens, in whatever thread."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import petals
from petals.client.connection.event_loop import client_loop

SRC = Path(petals.__file__).parent


class CalledFiles:
    """Collects, while ``is_on``, the files whose functions are called, in the order of first calls.

    Python 3.11 can set a profile function only for the calling thread and for threads that start
    later, so `installed` must be entered before the threads of interest start; the client's event
    loop, which may have started long ago, is reached by running code in it.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._names: dict[str, None] = {}

    def take(self) -> list[str]:
        """Names relative to ``src/petals`` since the last call of this method."""
        prefix = f"{SRC}/"
        names, self._names = list(self._names), {}
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    @contextmanager
    def installed(self) -> Iterator["CalledFiles"]:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        client_loop.run(_set_profile(self._note))
        try:
            yield self
        finally:
            client_loop.run(_set_profile(None))
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if self.is_on and event == "call":
            self._names.setdefault(frame.f_code.co_filename)


async def _set_profile(function: object) -> None:
    sys.setprofile(function)  # type: ignore[arg-type]
