"""The norm of many gradients by compiled code, in one pass."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrec.model.ops.native.build import library
from mmrec.model.ops.native.functions import addresses_and_sizes, takes_in_place


def takes(gradients: Sequence[Tensor]) -> bool:
    """Whether :func:`total_norm` takes ``gradients``."""
    return takes_in_place(gradients, torch.float32)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the root of the sum of all squares, a scalar in float32: :func:`torch.nn.utils.get_total_norm`."""
    kernels, found = library(torch.float32), ctypes.c_double()
    assert kernels is not None
    kernels.sum_of_squares(ctypes.c_int64(len(gradients)), *addresses_and_sizes(gradients), ctypes.byref(found))
    return torch.tensor(found.value**0.5, dtype=torch.float32)
