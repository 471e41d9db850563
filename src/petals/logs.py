"""Logging: every message goes to a logger under ``petals``; the command line decides where it is
shown.

Programs that import Petals see nothing unless they configure logging themselves, or have imported
hivemind: then they see what they saw with the original. Must not know network and torch.
"""

import logging
import sys
from typing import TextIO

from petals import constants

_ROOT = "petals"


def get_logger(name: str) -> logging.Logger:
    """The logger of one module (pass ``__name__``)."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(level: int | str = logging.INFO, stream: TextIO | None = None) -> None:
    """Show messages of ``level`` and above on ``stream`` (standard error if none is given).

    Called by commands, once; calling again replaces the handler installed before.
    """
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        if getattr(handler, "petals_owned", False):
            root.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
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
