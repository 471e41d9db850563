"""The reference of environment variables, from the constants of `petals.constants`."""

from petals import constants
from petals_docs.constants import documented_constants
from petals_docs.markdown import code, sentence, table


def render() -> str:
    """One row for each ``ENV_*`` constant."""
    rows = [
        (code(variable), sentence(meaning))
        for name, variable, meaning in documented_constants(constants)
        if name.startswith("ENV_")
    ]
    return table(("variable", "meaning"), rows)
