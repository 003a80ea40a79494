"""Muon's update of a matrix by compiled code: momentum, orthogonalization in bfloat16, the step of the weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.model.ops.native import functions
from mmrec.model.ops.native.products import has_tiles


class Momentum(NamedTuple):
    """How Muon averages gradients and orthogonalizes, as :class:`torch.optim.Muon` names it."""

    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    steps: int
    eps: float


def takes(parameters: list[Tensor]) -> bool:
    """Whether :func:`orthogonalize` and :func:`apply` take ``parameters``, which are matrices with gradients."""
    return has_tiles() and all(_takes(tensor) for each in parameters for tensor in (each, each.grad))


def _takes(tensor: Tensor | None) -> bool:
    return tensor is not None and functions.takes_in_place(tensor, torch.bfloat16)


def orthogonalize(gradient: Tensor, average: Tensor, how: Momentum, update: Tensor) -> None:
    """Bring ``average`` up to date, and make ``update`` the nearly orthogonal matrix next to the momentum.

    It differs from :func:`mmrec.training.muon.orthogonalize` in bfloat16 only in roundings.

    Args:
        gradient: [rows, columns], float32.
        average: of the gradients until now, likewise; it is changed.
        how: options of Muon.
        update: [rows, columns], bfloat16; it is written.
    """
    numbers = (*gradient.shape, how.steps, *how.coefficients, how.eps, how.momentum, how.nesterov)
    _run("muon_orthogonalize", *numbers, gradient, average, update)


def bring_up_to_date(average: Tensor, gradient: Tensor, momentum: float) -> None:
    """Make ``average`` that of the gradients with ``gradient``, as :func:`orthogonalize` does."""
    _run("muon_average", gradient.numel(), momentum, gradient, average)


def apply(weight: Tensor, update: Tensor, decay: float, rate: float) -> None:
    """Make ``weight`` [rows, columns], float32, ``decay`` of itself less ``rate`` of ``update``, bfloat16."""
    _run("muon_apply", weight.numel(), decay, rate, update, weight)


def _run(name: str, *arguments: float | Tensor) -> None:
    """Call a kernel, which takes whole matrices."""
    functions.prepared(name, torch.bfloat16, *arguments)()
