"""Modules that are run only when something of them is needed that is not known beforehand."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
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
        self._run()
        return getattr(self, name)

    def _run(self) -> None:
        self.__class__ = ModuleType  # type: ignore[assignment] # what it imports finds it half made, as ever
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)


class _PackageFirst(MetaPathFinder):
    """Runs a package that was put off before a module inside it is imported, as Python does with every package."""

    def __init__(self, package: _LazyModule) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{self._package.__name__}.") or not isinstance(self._package, _LazyModule):
            return None
        self._package._run()
        found = sys.modules.pop(fullname, None)  # what the package has imported itself is not run again
        return None if found is None else ModuleSpec(fullname, _Found(found))


class _Found(Loader):
    """Gives a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


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


def import_lazily(name: str, known: Mapping[str, Callable[[], object]], whole: bool = False) -> bool:
    """Put off running the code of the module ``name``; return whether that could be done.

    ``import`` then finds a module that is run at the first attribute that is not in ``known``. Nothing is done where
    it has been imported already, or does not exist.

    Args:
        name: of the module.
        known: attributes by name, each with what returns it.
        whole: a module inside this package runs it first, as ever; else those inside can be imported before it.
    """
    spec = None if name in sys.modules else _find(name)
    if spec is None or spec.loader is None:
        return False
    module = module_from_spec(spec)
    module.__class__ = _LazyModule
    module.__dict__["_known"] = known
    sys.modules[name] = module
    if whole:
        assert isinstance(module, _LazyModule)
        sys.meta_path.insert(0, _PackageFirst(module))
    return True


def put_off_compiler() -> None:
    """Import torch without its compiler, a quarter of the start of a training, until something is compiled.

    Lightning, torch's optimizers and its process groups ask some names of it at every start: a class of what was
    compiled, marks of what it is to leave out, and that it forget what it knows. As long as it has not been run,
    nothing is of that class, and neither the marks nor the rest have anything to do.
    """
    name = "torch._dynamo"

    def is_put_off() -> bool:
        return isinstance(sys.modules[name], _LazyModule)

    class OfCompiled(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return not is_put_off() and isinstance(instance, sys.modules[name].OptimizedModule)

    class OptimizedModule(metaclass=OfCompiled):
        """Nothing is of this class where nothing has been compiled."""

    def disable(function: Any = None, *options: Any, **named: Any) -> Any:
        if function is None:
            return partial(disable, **named)

        disabled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_put_off():
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(sys.modules[name].disable(function, *options, **named))
            return disabled[0](*args, **kwargs)

        return call

    def nothing(*_: object, **__: object) -> None: ...

    class Rules:
        clear_lru_cache = staticmethod(nothing)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(f"{name}.trace_rules"), attribute)

    known = {"OptimizedModule": OptimizedModule, "disable": disable, "graph_break": nothing, "trace_rules": Rules()}
    import_lazily(name, {key: partial(lambda value: value, value) for key, value in known.items()}, whole=True)


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
