"""What the launches of all Triton kernels of this program share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on the device of ``x``: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def row_strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of ``x`` [B, T, any] between rows and tokens; its channels must lie side by side."""
    return x.stride(0), x.stride(1)


def with_channels_together(x: Tensor) -> Tensor:
    """Return ``x``, copied where its last dimension is not laid out number by number."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(reset_mask: Tensor | None) -> Tensor | None:
    """Return ``reset_mask`` [B, T] (bool) as a kernel reads it."""
    return None if reset_mask is None else reset_mask.contiguous().view(torch.uint8)
