"""The norm of many gradients by compiled code, in one pass."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrec.model.ops.native.build import library


def takes(gradients: Sequence[Tensor]) -> bool:
    """Whether :func:`total_norm` takes ``gradients``."""
    return library(torch.float32) is not None and all(
        type(each) is Tensor and each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous()
        for each in gradients
    )


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the root of the sum of all squares, a scalar in float32: :func:`torch.nn.utils.get_total_norm`."""
    kernels, count = library(torch.float32), len(gradients)
    assert kernels is not None
    addresses = (ctypes.c_void_p * count)(*(each.data_ptr() for each in gradients))
    sizes = (ctypes.c_int64 * count)(*(each.numel() for each in gradients))
    found = ctypes.c_double()
    kernels.sum_of_squares(ctypes.c_int64(count), addresses, sizes, ctypes.byref(found))
    return torch.tensor(found.value**0.5, dtype=torch.float32)
