"""Muon's update of a matrix by compiled code: momentum, orthogonalization in bfloat16, the step of the weights."""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.model.ops.native.build import library


class Momentum(NamedTuple):
    """How Muon averages gradients and orthogonalizes, as :class:`torch.optim.Muon` names it."""

    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    steps: int
    eps: float


@cache
def is_supported() -> bool:
    """Return whether the kernels are built, and this processor has tile units for bfloat16 (Intel's AMX)."""
    kernels = library(torch.bfloat16)
    return kernels is not None and bool(kernels.muon_supported())


def takes(parameters: list[Tensor]) -> bool:
    """Whether :func:`orthogonalize` and :func:`apply` take ``parameters``, which are matrices with gradients."""
    gradients = [parameter.grad for parameter in parameters]
    return is_supported() and all(map(_takes, [*parameters, *gradients]))


def _takes(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )


def orthogonalize(gradient: Tensor, average: Tensor, how: Momentum, update: Tensor) -> None:
    """Bring ``average`` up to date, and make ``update`` the nearly orthogonal matrix next to the momentum.

    It differs from :func:`mmrec.training.muon.orthogonalize` in bfloat16 only in roundings.

    Args:
        gradient: [rows, columns], float32.
        average: of the gradients until now, likewise; it is changed.
        how: options of Muon.
        update: [rows, columns], bfloat16; it is written.
    """
    kernels, sizes = _kernels(), (c_int64(gradient.shape[0]), c_int64(gradient.shape[1]))
    scratch = torch.empty(kernels.muon_scratch(*sizes), dtype=torch.bfloat16)
    kernels.muon_orthogonalize(
        *sizes,
        c_int64(how.steps),
        *map(c_float, how.coefficients),
        c_float(how.eps),
        c_float(how.momentum),
        c_int64(how.nesterov),
        *(c_void_p(tensor.data_ptr()) for tensor in (gradient, average, scratch, update)),
    )


def bring_up_to_date(average: Tensor, gradient: Tensor, momentum: float) -> None:
    """Make ``average`` that of the gradients with ``gradient``, as :func:`orthogonalize` does."""
    addresses = c_void_p(gradient.data_ptr()), c_void_p(average.data_ptr())
    _kernels().muon_average(c_int64(gradient.numel()), c_float(momentum), *addresses)


def apply(weight: Tensor, update: Tensor, decay: float, rate: float) -> None:
    """Make ``weight`` [rows, columns], float32, ``decay`` of itself less ``rate`` of ``update``, bfloat16."""
    addresses = c_void_p(update.data_ptr()), c_void_p(weight.data_ptr())
    _kernels().muon_apply(c_int64(weight.numel()), c_float(decay), c_float(rate), *addresses)


@cache
def _kernels() -> CDLL:
    kernels = library(torch.bfloat16)
    assert kernels is not None
    kernels.muon_scratch.restype = c_int64
    return kernels
