"""Installs the simulated device in this process, and counts what is done on it."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import os
import traceback
import types
from collections.abc import Iterator
from typing import Any

import torch

from phantom import build

KERNEL, WAIT, UPLOAD = range(3)
DEFAULT_GENERATOR = "cuda:63"
"""The device of a generator that stands for the default one: see device.cpp."""
_library: ctypes.CDLL | None = None
_listener: Any = None  # kept alive for the library


class Counts:
    """What was done on the device since :func:`counted` began.

    Attributes:
        kernels: by the name of the operation, such as "addmm".
        waits: of the host for the device: by operation, and by the line of the package, or of a library, that asked.
    """

    def __init__(self) -> None:
        self.kernels: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()

    def listen(self, event: int, name: bytes | str) -> None:
        name = (name.decode() if isinstance(name, bytes) else name).removeprefix("aten::")
        if event == KERNEL:
            self.kernels[name] += 1
        elif event == WAIT:
            self.waits[name, _line()] += 1


_counts: list[Counts] = []


def _listen(event: int, name: bytes | str) -> None:
    for counts in _counts:
        counts.listen(event, name)


def _line() -> str:
    """Return the line of the package, and of the library called from there, that is being run."""
    own = called = ""
    for frame in traceback.extract_stack():
        if "/mmrec/" in frame.filename:
            own, called = f"mmrec/{frame.filename.rpartition('/mmrec/')[2]}:{frame.lineno}", ""
        elif "site-packages/" in frame.filename:
            called = f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
    return f"{own} > {called}" if called else own


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count what is done on the device."""
    counts = Counts()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


@contextlib.contextmanager
def uncounted(name: str) -> Iterator[None]:
    """Count what is done on the device as a single kernel."""
    others, _counts[:] = _counts[:], []
    try:
        yield
    finally:
        _counts[:] = others
        _listen(KERNEL, name)


def is_installed() -> bool:
    """Return whether this process has the simulated device."""
    return _library is not None


def install(devices: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
    """Make torch believe in ``devices`` CUDA devices, from here to the end of the process.

    Args:
        devices: their number. They share one random generator.
        capability: the compute capability that they say they have: bfloat16 from (8, 0) on.
    """
    global _library, _listener
    # What they look for depends on whether there is CUDA, and they look at import.
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch._inductor.utils")

    if _library is None:
        _library = ctypes.CDLL(str(build.library()), mode=ctypes.RTLD_GLOBAL)
        for name in ("allocated_bytes", "peak_bytes", "kernel_count"):
            getattr(_library, name).restype = ctypes.c_int64
        _listener = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)(_listen)
        _library.set_listener(_listener)
        _patch_storages()
    _library.set_device_count(devices)
    _patch_functions(_library, devices, capability)


def install_rank() -> None:
    """Make this process one of those that train together, each with a device of its own; for ``processes.run``."""
    from phantom import collectives

    install(int(os.environ.get("WORLD_SIZE", "1")))
    collectives.install()


class _Event:
    """An event, or a stream, of a device on which everything has happened when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0

    def wait(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, other: object) -> None:
        pass

    def record_event(self, other: object = None) -> _Event:
        return _Event()

    def __enter__(self) -> _Event:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def _patch_functions(library: ctypes.CDLL, devices: int, capability: tuple[int, int]) -> None:
    """Replace the functions of torch.cuda that a CPU build lacks."""
    from phantom import graphs

    generator = torch.Generator(device=DEFAULT_GENERATOR)
    properties = types.SimpleNamespace(
        name="Simulated",
        major=capability[0],
        minor=capability[1],
        total_memory=141 << 30,
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
    )

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return int(library.get_device() if found is None else found)

    class Device(contextlib.AbstractContextManager[None]):
        def __init__(self, device: Any) -> None:
            self.index = index(device)

        def __enter__(self) -> None:
            self.before = library.get_device()
            library.set_device(self.index)

        def __exit__(self, *args: object) -> None:
            library.set_device(self.before)

    functions: dict[str, Any] = {
        "device": Device,
        "Event": _Event,
        "Stream": _Event,
        "default_generators": (generator,) * devices,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: devices,
        "current_device": library.get_device,
        "set_device": lambda device: library.set_device(index(device)),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda including_emulation=True: capability[0] >= 8 or including_emulation,
        "synchronize": lambda device=None: _listen(WAIT, "synchronize"),
        "current_stream": lambda device=None: _Event(),
        "default_stream": lambda device=None: _Event(),
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": graphs.is_capturing,
        "CUDAGraph": graphs.Graph,
        "graph": graphs.Capture,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: library.allocated_bytes(),
        "max_memory_allocated": lambda device=None: library.peak_bytes(),
        "memory_reserved": lambda device=None: library.allocated_bytes(),
        "memory_stats": lambda device=None: {"allocated_bytes.all.peak": library.peak_bytes()},
        "reset_peak_memory_stats": lambda device=None: library.reset_counters(),
        "mem_get_info": lambda device=None: (140 << 30, 141 << 30),
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
        "get_rng_state_all": lambda: [generator.get_state()] * devices,
        "set_rng_state_all": lambda states: generator.set_state(next(iter(states))),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "seed_all": generator.seed,
        "initial_seed": generator.initial_seed,
    }
    for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
        for name, function in functions.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, function)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def _patch_storages() -> None:
    """Make storages of the device copied and resized by operations: a CPU build has no code for them."""
    untyped: Any = torch.UntypedStorage
    clone, resize = untyped.clone, untyped.resize_

    def copy(storage: Any, device: torch.device, non_blocking: bool = False) -> Any:
        result = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        return result.copy_(storage, non_blocking)

    def to(storage: Any, device: Any, non_blocking: bool = False) -> Any:
        device = torch.device(device)
        return storage if storage.device == device else copy(storage, device, non_blocking)

    def cloned(storage: Any) -> Any:
        return copy(storage, storage.device) if storage.device.type == "cuda" else clone(storage)

    def resized(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        with torch.no_grad():
            torch.ops.simulated_cuda.resize_storage(whole, size)
        return storage

    storages: Any = torch.storage
    storages._to = to
    untyped.clone, untyped.resize_ = cloned, resized
