"""How a serving process tells that it is ready and learns that it should stop.

Shared by `serve` and `bootstrap`. Knows files, pipes and signals; knows no swarm and no model.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


def write_ready_file(path: Path | None, content: Mapping[str, object]) -> None:
    """Put `content` and our pid into `path` as JSON; the file appears whole. None: do nothing."""
    if path is None:
        return
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"pid": os.getpid(), **content}, indent=2), encoding="utf-8")
    draft.replace(path)


def stop_when_stdin_closes() -> None:
    """Watch stdin in a thread; its end is our SIGTERM, however the holder of the pipe went."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
