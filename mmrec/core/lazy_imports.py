"""Modules that are run only when something of them is needed that is not known beforehand."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    """A module whose code has not been run yet: it is, at the first attribute that is not known."""

    _known: Mapping[str, Callable[[], object]]

    def __getattr__(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]()
        self.__class__ = ModuleType  # type: ignore[assignment] # what it imports finds it half made, as ever
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _find(name: str) -> ModuleSpec | None:
    """Return where the module ``name`` is, without importing the packages around it; None where there is none."""
    spec, path, so_far = None, None, ""
    for part in name.split("."):
        so_far = f"{so_far}.{part}" if so_far else part
        spec = PathFinder.find_spec(so_far, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def import_lazily(name: str, known: Mapping[str, Callable[[], object]]) -> bool:
    """Put off running the code of the module ``name``; return whether that could be done.

    ``import`` then finds a module that is run at the first attribute that is not in ``known``. Of a package, modules
    inside can be imported before. Nothing is done where it has been imported already, or does not exist.

    Args:
        name: of the module.
        known: attributes by name, each with what returns it.
    """
    spec = None if name in sys.modules else _find(name)
    if spec is None or spec.loader is None:
        return False
    module = module_from_spec(spec)
    module.__class__ = _LazyModule
    module.__dict__["_known"] = known
    sys.modules[name] = module
    return True


def put_off_compiler() -> None:
    """Import torch without its compiler, which Lightning asks for two names of; for a process that prints a help."""

    class OptimizedModule:
        """Nothing is of this class where nothing has been compiled."""

    def disable(function: Any = None, *_: object, **__: object) -> Any:
        return function if function is not None else disable

    import_lazily("torch._dynamo", {"OptimizedModule": lambda: OptimizedModule, "disable": lambda: disable})


def put_off_metrics() -> None:
    """Import no more of torchmetrics than Lightning needs: its base classes.

    The package imports all of its metrics, and with them transformers and SciPy where they are installed: a third of
    the start of a training. What else is asked of it later still runs it in full.
    """
    known = {
        "Metric": lambda: import_module("torchmetrics.metric").Metric,
        "MetricCollection": lambda: import_module("torchmetrics.collections").MetricCollection,
        "_logger": lambda: logging.getLogger("torchmetrics"),
        "__version__": lambda: metadata.version("torchmetrics"),
    }
    if import_lazily("torchmetrics", known):
        import_module("torchmetrics.utilities")  # before any other: it and torchmetrics.metric import each other
