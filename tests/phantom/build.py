"""Builds the simulated device from its source, once for each version of it and of torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "device.cpp", FOLDER / "device.h")
TORCH = Path(torch.__file__).parent


def why_not() -> str | None:
    """Return why it cannot be built here, or None where it can."""
    if shutil.which("g++") is None:
        return "the simulated CUDA device is built by g++, which is missing"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "the simulated CUDA device takes the place of none: it needs a CPU build of torch"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return f"the simulated CUDA device is written for torch 2.13; this is {torch.__version__}"
    if not (TORCH / "include" / "ATen" / "ATen.h").exists():
        return "the simulated CUDA device needs the headers of torch's wheel"
    return None


def cache() -> Path:
    """Return the folder that keeps what was built: outside of the repository, for the next session."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "mmrec-tests"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "mmrec-tests"


def library() -> Path:
    """Return the shared library; built first, in a quarter of a minute, where that has not been done."""
    sources = b"".join(source.read_bytes() for source in SOURCES)
    version = hashlib.sha256(sources + torch.__version__.encode()).hexdigest()[:16]
    target = cache() / f"simulated_cuda-{version}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
            libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
            part = target.with_suffix(".part")
            command = [
                "g++",
                "-O1",
                "-std=c++20",
                "-fPIC",
                "-shared",
                *includes,
                f"{SOURCES[0]}",
                "-o",
                f"{part}",
                *libraries,
            ]
            subprocess.run(command, check=True, capture_output=True, text=True)
            part.rename(target)
    return target
