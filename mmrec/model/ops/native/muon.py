"""Muon's update of matrices by compiled code: momentum, orthogonalization in bfloat16, the step of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int64

import torch
from torch import Tensor

from mmrec.core.threads import share_out
from mmrec.model.ops.native.functions import (
    addresses,
    addresses_and_sizes,
    call_by_threads,
    integers,
    prepared,
    takes_in_place,
)
from mmrec.model.ops.native.products import has_tiles


class Momentum(Structure):
    """How Muon averages gradients and orthogonalizes, as :class:`torch.optim.Muon` names it."""

    _fields_ = [
        *((name, c_int64) for name in ("steps", "nesterov")),
        *((name, c_float) for name in ("a", "b", "c", "eps", "momentum")),
    ]


def takes(tensors: Sequence[Tensor | None]) -> bool:
    """Whether :func:`orthogonalize` and :func:`apply` take ``tensors``: matrices, their gradients and averages."""
    return has_tiles() and takes_in_place(tensors, torch.bfloat16)


def orthogonalize(
    how: Momentum,
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    starts: Sequence[int],
    updates: Tensor,
) -> None:
    """Bring ``averages`` up to date, and write the nearly orthogonal matrices next to the momentum.

    They differ from those of :func:`mmrec.training.muon.orthogonalize` in bfloat16 only in roundings. The matrices
    are shared out over as many threads as torch computes with.

    Args:
        how: options of Muon.
        gradients: matrices, float32.
        averages: of the gradients until now, likewise; they are changed.
        starts: of each matrix: where in ``updates`` it is written; -1 where it is not orthogonalized.
        updates: [numbers], bfloat16; it is written.
    """
    threads = min(torch.get_num_threads(), len(gradients))
    owners = share_out([min(each.shape) * each.numel() for each in gradients], threads)

    def call(thread: int) -> Callable[[], None]:
        some = [n for n, owner in enumerate(owners) if owner == thread]
        grads, means = [gradients[n] for n in some], [averages[n] for n in some]
        heights, widths = (integers([each.shape[side] for each in grads]) for side in (0, 1))
        given = addresses(grads), addresses(means), integers([starts[n] for n in some])
        return prepared("muon_orthogonalize", torch.bfloat16, how, len(some), heights, widths, *given, updates)

    call_by_threads([call(thread) for thread in range(threads)])


def apply(
    weights: Sequence[Tensor], decay: float, rates: Sequence[float], starts: Sequence[int], updates: Tensor
) -> None:
    """Make each of ``weights``, float32, ``decay`` of itself less its rate times its update.

    Args:
        weights: matrices.
        decay: of all of them.
        rates: of each.
        starts: of each: where its update begins in ``updates``.
        updates: [numbers], bfloat16.
    """
    how = (c_float * len(rates))(*rates), decay, integers(starts)
    prepared("muon_apply", torch.bfloat16, len(weights), *addresses_and_sizes(weights), *how, updates)()
