"""Output of commands: data on stdout, messages on stderr, errors as one sentence and a hint.

rich draws on a terminal only; elsewhere lines are plain. Must not know commands, torch and network.
"""

import codecs
import gc
import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from petals.cli.terminal.wording import respell_flags
from petals.errors import ConfigError, PetalsError, RequestError
from petals.logs import downloads_shown_by

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


def talk() -> Console:
    """The console for messages; made at each call so that it follows a redirected stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of messages."""
    talk().print(text, markup=False)


def run_as_command(work: Callable[[], object], spelling: Mapping[str, str] | None = None) -> None:
    """Run `work`; an error becomes a sentence, a hint and an exit status.

    Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted. ``spelling`` gives the flags of
    hints (``--swarm-key``) as this command spells them.
    """
    make_streams_encode_everything()
    try:
        work()
    except PetalsError as error:
        sys.exit(report(error, spelling or {}))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # At its exit Python searches all of torch for cycles, several times, which takes seconds.
        gc.freeze()


_PICTURES = {"█": "#", "░": "+", "·": ".", "…": "..", "→": "->", "⇄": "<->"}
"""What is drawn, for terminals and files that hold ASCII only."""


def make_streams_encode_everything() -> None:
    """In an ASCII locale print pictures in ASCII, and other characters as escapes: \\u20ac.

    Nothing that is printed fails, and no character is lost.
    """
    codecs.register_error("petals", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="petals")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = (
        _PICTURES.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text
    )
    return "".join(escaped), error.end


def print_data(text: str) -> None:
    """One line of data."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of data under their heads, in plain text, as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    for row in (heads, *rows):
        print_data("  ".join(f"{entry:<{width}}" for entry, width in zip(row, widths)).rstrip())


def print_json(value: object) -> None:
    """A JSON document on stdout, for machines."""
    print_data(json.dumps(value, indent=2, ensure_ascii=False))


def report(error: PetalsError, spelling: Mapping[str, str] = MappingProxyType({})) -> int:
    """Print what went wrong and what to type next; return the exit status."""
    sentence, _, hint = str(error).partition("\nhint: ")
    console = talk()
    console.print(f"error: {sentence}", style="red", markup=False)
    if hint:
        console.print(f"hint: {respell_flags(hint, spelling)}", markup=False)
    return EXIT_WRONG_INPUT if isinstance(error, (ConfigError, RequestError)) else EXIT_FAILED


class Activity:
    """What a command is doing: a moving bar on a terminal, one line for each change elsewhere.

    ``keeps_lines`` leaves a line with the time for each finished stage on a terminal, too. Inside
    the context downloads are drawn as further bars.
    """

    def __init__(self, text: str, keeps_lines: bool = False) -> None:
        console = talk()
        self._is_drawn = console.is_terminal
        self._keeps_lines = keeps_lines
        self._text, self._began = text, time.monotonic()
        can_draw = console.encoding.startswith("utf")
        self._progress = Progress(
            SpinnerColumn("dots" if can_draw else "line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_drawn,
        )
        self._task = self._progress.add_task(text, total=None)

    def __enter__(self) -> "Activity":
        if not self._is_drawn:
            say(self._text)
            return self
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing; changes are printed as lines from now on."""
        if self._is_drawn:
            self._is_drawn = False
            self._progress.stop()
            if self._keeps_lines:
                say(self._text)

    def change(self, text: str) -> None:
        """The next stage."""
        if not self._is_drawn:
            say(text)
            return
        if self._keeps_lines:
            say(f"{self._text} ({time.monotonic() - self._began:.1f} s)")
        self._text, self._began = text, time.monotonic()
        self._progress.reset(self._task, description=text, total=None)

    def measure(self, done: int, total: int) -> None:
        """Bytes of this stage that are done, and all of them. May be called from any thread."""
        self._progress.update(self._task, completed=done, total=total)

    def download_bar(self) -> type:
        """A class in the manner of tqdm, for huggingface_hub: each instance is one more bar."""
        progress = self._progress

        class DownloadBar:
            def __init__(self, *_: object, desc: str = "", **tqdm: Any) -> None:
                self.total = tqdm.get("total")
                self._task = progress.add_task(f"  {desc}", total=self.total)
                self.update(tqdm.get("initial") or 0)

            def __enter__(self) -> "DownloadBar":
                return self

            def __exit__(self, *exc_info: object) -> None:
                self.close()

            def update(self, num_bytes: float = 1) -> None:
                progress.update(self._task, advance=num_bytes, total=self.total)

            def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
                """The speed is not drawn."""

            def close(self) -> None:
                if self._task in progress.task_ids:
                    progress.remove_task(self._task)

        return DownloadBar


class _AmountColumn(DownloadColumn):
    """Bytes, where they are counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


@contextmanager
def stage(text: str, keeps_lines: bool = False) -> Iterator[Activity]:
    """An ``Activity`` that also shows what is downloaded meanwhile."""
    with Activity(text, keeps_lines) as activity, downloads_shown_by(activity.download_bar()):
        yield activity


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, so that every child process is stopped.

    Also where SIGINT was ignored before, as in a background job: `petals serve` obeys it, too.
    """

    def unwind(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, unwind) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
