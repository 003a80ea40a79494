"""AdamW's update of many tensors by compiled code, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import Structure, c_double

import torch
from torch import Tensor

from mmrec.model.ops.native.functions import addresses, addresses_and_sizes, prepared, takes_in_place


class Rule(Structure):
    """The learning rate, the weight decay, the two betas and epsilon, as :class:`torch.optim.AdamW` names them."""

    _fields_ = [(name, c_double) for name in ("rate", "decay", "beta1", "beta2", "epsilon")]


def takes(tensors: Iterable[Tensor | None]) -> bool:
    """Whether :func:`update` takes ``tensors``."""
    return takes_in_place(tensors, torch.float32)


def update(
    rule: Rule,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Update ``weights``, as :class:`torch.optim.AdamW` does, and what is kept of each; all are float32.

    Args:
        rule: the options.
        weights: tensors of any shapes.
        gradients: of each weight.
        means: running means of the gradients.
        squares: running means of their squares.
        steps: scalars, how often each weight was updated before.
    """
    if not weights:
        return
    kept = (addresses(each) for each in (gradients, means, squares, steps))
    prepared("adamw_update", torch.float32, rule, len(weights), *addresses_and_sizes(weights), *kept)()
