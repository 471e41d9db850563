"""Where an error came from, and where a call that hangs waits."""

import asyncio
import sys
import traceback
from pathlib import Path
from typing import Any

from petals.client.connection.event_loop import client_loop


def error_line(error: BaseException) -> str:
    """An error, its cause, and the last places it came through, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    cause = "" if error.__cause__ is None else f" from {error.__cause__!r}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{cause} at {places}"


def stacks() -> str:
    """Where the threads of this process and the tasks of its client wait."""

    async def tasks() -> list[str]:
        return [f"task {task.get_name()}: {_places(task)}" for task in asyncio.all_tasks()]

    threads = ["".join(traceback.format_stack(f)[-6:]) for f in sys._current_frames().values()]
    return "\n".join([*threads, *client_loop.run(tasks(), 5.0)])


def _places(task: "asyncio.Task[Any]") -> str:
    """The lines it waits at, from the innermost to the outermost."""
    places, awaited = [], task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        awaited = awaited.cr_await
    return " < ".join(reversed(places))
