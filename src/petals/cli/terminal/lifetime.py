"""How a serving process reports that it is ready, and what ends a process.

Must not know swarm and model.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from petals import constants


def write_ready_file(path: Path | None, content: Mapping[str, object]) -> None:
    """Write `content` and the pid to `path` as JSON; the file appears whole. None: do nothing."""
    if path is None:
        return
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"pid": os.getpid(), **content}, indent=2), encoding="utf-8")
    draft.replace(path)


def running_dir() -> Path:
    """Where lasting processes of this user write what they do, for `petals ps`."""
    return constants.cache_dir() / "running"


@contextmanager
def listed_as_running() -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Yields how to publish what this process does to `petals ps`; it is taken back at the end.

    Without a cache folder that can be written `petals ps` knows less.
    """
    file = running_dir() / f"{os.getpid()}.json"

    def publish(content: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_ready_file(file, content)

    try:
        yield publish
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def stop_when_stdin_closes() -> None:
    """Watch stdin in a thread; its end becomes SIGTERM, so that this process ends with its parent,
    even if that is killed.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()


class Interrupts:
    """Counts Ctrl-C while something long runs, in ``pressed``.

    The first one is to end the work; a second one may follow because the clean-up waits. Libraries
    may also swallow the exception that Ctrl-C raises, for example while they are imported.
    """

    def __init__(self) -> None:
        self.pressed = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, each Ctrl-C is counted and raises KeyboardInterrupt."""

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self.pressed += 1
            raise KeyboardInterrupt

        self.pressed = 0
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
