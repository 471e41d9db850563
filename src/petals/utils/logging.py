"""The original's import path of what it did to logging at import."""

from petals.logs import show_with_hivemind as initialize_logs

__all__ = ["initialize_logs"]
