"""The names of the services that a stream can be opened for, from `petals.wire.services`."""

from petals.wire import services
from petals_docs.constants import documented_constants
from petals_docs.markdown import code, sentence, table


def render() -> str:
    """One row for each constant of the module."""
    rows = [
        (code(value), sentence(meaning)) for _, value, meaning in documented_constants(services)
    ]
    return table(("service", "meaning"), rows)
