"""Imports of hivemind without the parts that need torch and scipy.

The ``__init__`` modules of hivemind import its averaging, experts and optimizers, and with them
torch and scipy: 1.6 s of the 2.2 s that `petals status` took (2 cores, files in memory). The engine
uses none of that. Must not know what the engine uses.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from types import ModuleType

_PACKAGES = ("hivemind", "hivemind.dht", "hivemind.utils")
_LIGHT = {
    "hivemind.utils": ("logging", "serializer", "timed_storage", "asyncio", "nested"),
}
"""Modules whose names the package re-exports, and which import quickly."""


def defer_init_modules() -> None:
    """Register hivemind's packages without running their ``__init__``; it runs when a name is asked
    for that only it can give, so that programs which use hivemind themselves see all of it.

    Does nothing if hivemind is imported already.
    """
    if "hivemind" in sys.modules:
        return
    path = None
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return  # the import that follows raises the right error
        package = importlib.util.module_from_spec(spec)
        package.__dict__["__getattr__"] = _Deferred(package)
        sys.modules[name] = package
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, package)
        else:
            path = package.__path__


class _Deferred:
    """The ``__getattr__`` of a package whose ``__init__`` has not run."""

    def __init__(self, package: ModuleType) -> None:
        self._package = package

    def __call__(self, name: str) -> object:
        package = self._package
        own = package.__name__
        is_special = name.startswith("__") and name != "__version__"
        if is_special or importlib.util.find_spec(f"{own}.{name}") is not None:
            raise AttributeError(name)  # the import system asks before it imports a submodule
        for light in _LIGHT.get(own, ()):
            found = getattr(importlib.import_module(f"{own}.{light}"), name, None)
            if found is not None:
                return found
        spec = package.__spec__
        is_deferred = package.__dict__.pop("__getattr__", None) is not None
        if is_deferred and spec is not None and spec.loader is not None:
            spec.loader.exec_module(package)
        return getattr(package, name)
