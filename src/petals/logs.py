"""Logging, the wording of counts, and who shows downloads: what every layer says to users.

Every message goes to a logger under ``petals``; the command line decides where it is shown.
Programs that import Petals see nothing unless they configure logging themselves, or have imported
hivemind: then they see what they saw with the original. Must not know network and torch.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from petals import constants

_ROOT = "petals"

_download_bars: list[type] = []


def get_logger(name: str) -> logging.Logger:
    """The logger of one module (pass ``__name__``)."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def plural(count: int, noun: str) -> str:
    """``1 server``, ``2 servers``: how a count of things is printed."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def download_bar() -> type | None:
    """The ``tqdm_class`` of huggingface_hub; None is its own bar, drawn on terminals only."""
    return _download_bars[-1] if _download_bars else None


@contextmanager
def downloads_shown_by(bar: type) -> Iterator[None]:
    """Inside, downloads of this process are shown by ``bar``, a class in the manner of tqdm."""
    _download_bars.append(bar)
    try:
        yield
    finally:
        _download_bars.remove(bar)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time: a bar replaces it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logging(level: int | str = logging.INFO, stream: TextIO | None = None) -> None:
    """Show messages of ``level`` and above on ``stream`` (standard error if none is given).

    Called by commands, once; calling again replaces the handler installed before.
    """
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        if getattr(handler, "petals_owned", False):
            root.removeHandler(handler)
    handler = _StderrHandler() if stream is None else logging.StreamHandler(stream)
    handler.petals_owned = True  # type: ignore[attr-defined]
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    )
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False


def show_with_hivemind() -> None:
    """Show the messages of all loggers with hivemind's handler, as the original did at import.

    Only in a program that has imported hivemind and has not configured logging itself; the
    variable PETALS_LOGGING=False prevents it.
    """
    hivemind_logging = sys.modules.get("hivemind.utils.logging")
    if hivemind_logging is None or logging.getLogger().handlers or not constants.shows_logs():
        return
    hivemind_logging.use_hivemind_log_handler("in_root_logger")
