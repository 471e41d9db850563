"""The reference of errors, from the tree in `petals.errors`."""

from petals.errors import ERRORS_BY_CODE, PetalsError
from petals_docs.markdown import code, docstring, sentence, table


def render() -> str:
    """One section for each family of errors, one row for each class."""
    kinds = ERRORS_BY_CODE.values()
    families = [kind for kind in kinds if PetalsError in kind.__bases__]
    return "\n".join(_section([k for k in kinds if issubclass(k, family)]) for family in families)


def _section(kinds: list[type[PetalsError]]) -> str:
    """A family, its root first."""
    rows = [
        (code(kind.code), code(kind.__name__), _meaning(kind), kind.default_hint) for kind in kinds
    ]
    head = ("code", "class", "meaning", "hint")
    return f"## {kinds[0].__name__}\n\n" + table(head, rows)


def _meaning(kind: type[PetalsError]) -> str:
    said = sentence(docstring(kind))
    builtins = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"]
    if builtins:
        said += f" Also a {code(builtins[0])}."
    if kind.retryable and "retryable" not in vars(kind.__bases__[0]):
        said += " Retryable."
    return said
