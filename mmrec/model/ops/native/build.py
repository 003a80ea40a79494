"""Builds the C kernels of this folder with the machine's own compiler, once, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import BoundedSemaphore, Thread

import torch

from mmrec.core.errors import one_line
from mmrec.core.file_system import own_temporary_folder
from mmrec.core.files import write_file
from mmrec.core.threads import available_cores

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
)
FOR_THIS_MACHINE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Of these the first are taken that the compiler knows."""
LEARNING = "learning"
"""The library of what learns from a text while it is read, apart from the training of models."""
Kind = torch.dtype | str
"""Which library: that of the kernels for matrix products of a dtype, or :data:`LEARNING`."""
_LAYERS = ("long_memory", "losses", "pointwise", "short_memory")
SOURCES: dict[Kind, tuple[str, ...]] = {
    torch.float32: (*_LAYERS, "exchange"),
    torch.bfloat16: (*_LAYERS, "muon", "products"),
    LEARNING: ("learning", "ngram_mixture", "ngrams"),
}
"""Sources of each library: nothing is compiled that it is not asked for."""
FOR_MODELS = (torch.float32, torch.bfloat16)

SWITCH = "MMREC_NATIVE"
"""Environment variable: at 0 the kernels are neither built nor used."""

AT_ONCE = BoundedSemaphore(available_cores())
"""Lets as many compilers run at once as there are cores, for whichever library. It is made before the threads that
take it: where the first of them makes it, those that begin together each make their own."""
_begun: list[Thread] = []
_failed: dict[object, str] = {}
"""What was compiled in vain, by library, compiler and folder, and why."""


def begin() -> None:
    """Compile models' kernels that are not there yet beside what this process does; who wants one waits for all."""
    if os.environ.get(SWITCH) == "0" or _begun:
        return
    with suppress(OSError):
        _cache_folder()  # here: imports in two threads can wait for each other
    # A process that ends, by Ctrl-C for example, does not wait for them.
    _begun.extend(Thread(target=_try, args=(kind,), name="mmrec-build", daemon=True) for kind in FOR_MODELS)
    for each in _begun:
        each.start()


def _try(kind: Kind) -> None:
    with suppress(OSError):  # whoever wants it is told
        _built(kind)


@cache
def library(kind: Kind) -> ctypes.CDLL | None:
    """Return a library; None where it is not wanted or cannot be built, or there is none."""
    if kind not in SOURCES or os.environ.get(SWITCH) == "0":
        return None
    for each in _begun:
        each.join()
    try:
        return ctypes.CDLL(str(_built(kind)))
    except OSError:
        return None


def is_built() -> bool:
    """Return whether there are kernels for models, of every dtype; they are built where they are not yet."""
    return all(library(kind) is not None for kind in FOR_MODELS)


def problem(kind: Kind = torch.float32) -> str | None:
    """Return why a library cannot be had, and what helps; None where it can, or nobody wants any."""
    if library(kind) is not None or os.environ.get(SWITCH) == "0":
        return None
    try:
        path = _built(kind)
    except OSError as error:
        return str(error)
    return f"the compiled kernels {path} cannot be loaded"


def _built(kind: Kind) -> Path:
    """Return the path of a library, which is compiled where it is not there yet; OSError where that fails.

    What has failed is not tried again: it takes as long as what succeeds.
    """
    compiler, folder = _compiler(), _cache_folder()
    key = kind, compiler, folder
    if key not in _failed:
        try:
            return _first_built(kind, compiler, folder)
        except OSError as error:
            _failed[key] = one_line(error)
    raise OSError(_failed[key])


def _first_built(kind: Kind, compiler: tuple[str, ...], folder: Path) -> Path:
    said, sources = "", _sources(kind)
    for machine in FOR_THIS_MACHINE:
        command = (*compiler, *FLAGS, *machine, *(("-DBFLOAT16",) if kind == torch.bfloat16 else ()))
        path = folder / f"kernels-{_digest(command, sources)}.so"
        if path.exists():
            return path
        said = _build(command, sources, path)
        if not said:
            return path
    raise OSError(said)


def _compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: that of ``CC``, else the first that is found; OSError without one."""
    named = os.environ.get("CC", "")
    try:
        words = shlex.split(named)
    except ValueError:  # quotation marks that are not closed
        words = [named]
    if words and not shutil.which(words[0]):
        raise OSError(f"CC is {named}, and there is no such compiler")
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not words and found is None:
        raise OSError("there is no C compiler; install gcc or clang")
    return tuple(words) or (str(found),)


@cache
def _digest(command: tuple[str, ...], sources: tuple[Path, ...]) -> str:
    """Return a name for what ``command`` makes of the sources on this kind of processor."""
    program = os.stat(shutil.which(command[0]) or command[0])
    parts = [" ".join(command).encode(), f"{program.st_size} {program.st_mtime_ns}".encode(), _processor().encode()]
    parts += [source.read_bytes() for source in (*sources, *sorted(FOLDER.glob("*.h")))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> str:
    """Return what tells one kind of processor from another that cannot run its code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _cache_folder() -> Path:
    """Return the folder that keeps what was built: the user's cache, else one of the user's for temporary files.

    OSError where others may write into the latter: what is in it is run.
    """
    import pooch  # late: it takes a tenth of a second

    folder = Path(pooch.os_cache("mmrec"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return own_temporary_folder("mmrec")


def _build(command: tuple[str, ...], sources: tuple[Path, ...], path: Path) -> str:
    """Compile the sources to ``path``, which is there whole or not at all; return what went wrong, if anything.

    As many sources are compiled at once as there are cores, in their order.
    """
    with tempfile.TemporaryDirectory(prefix="mmrec-", ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / path.name
        objects = {source: Path(scratch) / f"{source.stem}.o" for source in sources}
        compilations = [[*command, "-c", str(source), "-o", str(target)] for source, target in objects.items()]
        said = _run_all(compilations) or _run([*command, *map(str, objects.values()), "-o", str(made), "-lm"])
        if not said:
            write_file(path, made.read_bytes())
    return said


def _sources(kind: Kind) -> tuple[Path, ...]:
    """Return the sources of a library, the largest first."""
    paths = [FOLDER / f"{name}.c" for name in SOURCES[kind]]
    return tuple(sorted(paths, key=lambda source: (-source.stat().st_size, source.name)))


def _run_all(commands: Sequence[Sequence[str]]) -> str:
    """Run compilers, as many at once as there are cores, until one fails; return what went wrong, if anything.

    Python would wait at its end for the threads of a pool, and for all that they have still to do.
    """
    left, said = list(commands), list[str]()

    def work() -> None:
        with suppress(IndexError):
            while not said:
                with AT_ONCE:
                    if not said and (wrong := _run(left.pop(0))):  # another may have failed while this one waited
                        said.append(wrong)

    threads = [Thread(target=work, daemon=True) for _ in range(available_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said[0] if said else ""


def _run(command: Sequence[str]) -> str:
    """Run a compiler; return what went wrong, if anything."""
    try:
        ended = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if ended.returncode == 0 and Path(command[command.index("-o") + 1]).exists():
        return ""
    said = ended.stderr.decode(errors="replace").strip() or f"exit status {ended.returncode}"
    return f"{command[0]} failed: {said.splitlines()[0]}"
