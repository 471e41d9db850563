"""How a serving process reports that it is ready, and when it stops.

Shared by `serve` and `bootstrap`. Must not know swarm and model.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


def write_ready_file(path: Path | None, content: Mapping[str, object]) -> None:
    """Write `content` and the pid to `path` as JSON; the file appears whole. None: do nothing."""
    if path is None:
        return
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"pid": os.getpid(), **content}, indent=2), encoding="utf-8")
    draft.replace(path)


def stop_when_stdin_closes() -> None:
    """Watch stdin in a thread; its end becomes SIGTERM, so that this process ends with its parent,
    even if that is killed.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
