"""The device that a command computes on: found by name, and tried before anything is loaded onto it."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from mmrec.core.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    import torch

AUTO, CPU = "auto", "cpu"
KNOWN = (AUTO, CPU, "cuda", "mps")
NO_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no numbers of 64 bits."""


def find_device(name: str) -> torch.device:
    """Return the device that ``--device NAME`` means.

    Args:
        name: auto, cpu, cuda, mps, or cuda with a number, such as cuda:1. "auto" is the first CUDA device, else MPS
            where a computation on it succeeds, else the CPU.

    Raises:
        UserError: there is no such device here, or nothing can be computed on it.
    """
    import torch

    check_device_name(name)
    if name != AUTO:
        if reason := _failure(torch.device(name)):
            raise UserError(f"--device is {name}: {reason}; give another, or auto for the best that works here")
        return torch.device(name)
    for kind in [kind for kind, there in (("cuda", _cuda_count() > 0), ("mps", _has_mps())) if there]:
        reason = _failure(torch.device(kind))
        if not reason:
            return torch.device(kind)
        print(f"{kind} is here, but {reason}; computing on the CPU", file=sys.stderr)
    return torch.device(CPU)


def device_of_accelerator(name: str) -> torch.device:
    """Return what is computed on with Lightning's accelerator ``name``: CUDA where it may be, else the CPU."""
    import torch

    return torch.device("cuda" if name != CPU and _cuda_count() else CPU)


def check_device_name(name: str) -> None:
    """Raise UserError where ``name`` is the name of no device, whether it is here or not."""
    if name not in KNOWN and not re.fullmatch(r"cuda:[0-9]{1,3}", name):
        raise UserError(f"--device is {name!r}; it must be {', '.join(KNOWN)} or cuda:NUMBER{nearest(name, KNOWN)}")


def has_float64(device: torch.device) -> bool:
    """Return whether ``device`` can hold numbers of 64 bits."""
    return device.type not in NO_FLOAT64


def _cuda_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def _failure(device: torch.device) -> str | None:
    """Return why nothing can be computed on ``device``; None where it can."""
    import torch

    if device.type == "cuda":
        if not (count := _cuda_count()):
            built = "no CUDA device is found" if torch.version.cuda else "this torch is built without CUDA"
            return f"{built} (torch {torch.__version__})"
        if (device.index or 0) >= count:
            return f"there {'is one CUDA device' if count == 1 else f'are {count} CUDA devices'}, from cuda:0 on"
    if device.type == "mps" and not _has_mps():
        return f"MPS is not available (torch {torch.__version__})"
    try:
        if float((torch.ones(2, device=device) + 1).sum()) != 4:
            return "it computes wrong sums"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"it does not work: {one_line(error)[:120]}"
    return None
