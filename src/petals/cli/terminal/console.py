"""Output of commands: data on stdout, messages on stderr, errors as one sentence and a hint.

rich draws on a terminal only; elsewhere lines are plain. Must not know commands, torch and network.
"""

import codecs
import gc
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from petals.errors import ConfigError, PetalsError, RequestError

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


def talk() -> Console:
    """The console for messages; made at each call so that it follows a redirected stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of messages."""
    talk().print(text, markup=False)


def run_as_command(work: Callable[[], object]) -> None:
    """Run `work`; an error becomes a sentence, a hint and an exit status.

    Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted.
    """
    make_streams_encode_everything()
    try:
        work()
    except PetalsError as error:
        sys.exit(report(error))
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


def print_json(value: object) -> None:
    """A JSON document on stdout, for machines."""
    print_data(json.dumps(value, indent=2, ensure_ascii=False))


def report(error: PetalsError) -> int:
    """Print what went wrong and what to type next; return the exit status."""
    sentence, _, hint = str(error).partition("\nhint: ")
    console = talk()
    console.print(f"error: {sentence}", style="red", markup=False)
    if hint:
        console.print(f"hint: {hint}", markup=False)
    return EXIT_WRONG_INPUT if isinstance(error, (ConfigError, RequestError)) else EXIT_FAILED


@contextmanager
def stage(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, one line per change elsewhere; yields how to change the text."""
    console = talk()
    if not console.is_terminal:
        say(text)
        yield say
        return
    with console.status(text) as status:
        yield lambda changed: status.update(changed)


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
