"""The reference of errors, from the tree in `petals.errors`."""

from petals.errors import PetalsError
from petals_docs.markdown import code, docstring, sentence, table


def render() -> str:
    """One section for each family of errors, one row for each class."""
    return "\n".join(_family(family) for family in PetalsError.__subclasses__())


def _family(family: type[PetalsError]) -> str:
    rows = [
        (code(kind.code), code(kind.__name__), _meaning(kind), kind.default_hint)
        for kind in _descendants(family)
    ]
    heading = f"## {family.__name__}\n\n"
    head = ("code", "class", "meaning", "hint")
    return heading + table(head, rows)


def _descendants(kind: type[PetalsError]) -> list[type[PetalsError]]:
    found = [kind]
    for child in kind.__subclasses__():
        found += _descendants(child)
    return found


def _meaning(kind: type[PetalsError]) -> str:
    said = sentence(docstring(kind))
    builtins = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"]
    if builtins:
        said += f" Also a {code(builtins[0])}."
    if kind.retryable and "retryable" not in vars(kind.__bases__[0]):
        said += " Retryable."
    return said
