"""Constants of a module with the string that stands after each, which describes it."""

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType


def documented_constants(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """(name, value, description) of every text constant that has one, in the module's order."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, after in zip(body, body[1:]):
        match statement, after:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))),
                ast.Expr(value=ast.Constant(value=str(description))),
            ):
                yield name, value, inspect.cleandoc(description)
