"""The objective of training: the loss of the tokens and the confidence penalty, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmrec.data.batches import IGNORE_INDEX
from mmrec.inference.metrics import token_nll
from mmrec.model import Hidden, RecurrentLM
from mmrec.model.ops import dispatch
from mmrec.model.token_counts import SPAN

MOST_LOGITS = 1 << 25
"""Logits that are held at a time, 128 MiB of float32: those of more are computed again for the gradients."""


def summed_losses(net: RecurrentLM, hidden: Hidden, targets: Tensor, penalized: bool) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of the targets and :func:`confidence`, in nats, both summed.

    Where there would be more than :data:`MOST_LOGITS` logits, they are computed for some places after the other, and
    none is kept for the gradients: for them they are computed once more, as much work as a third of the head's.

    Args:
        net: the model.
        hidden: of B rows of T tokens.
        targets: [B, T], int64: a token or :data:`mmrec.data.batches.IGNORE_INDEX`.
        penalized: whether the confidence is wanted; it is 0 else.
    """

    def of(hidden: Hidden, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = net.logits(hidden)
        if kernels := dispatch.native_losses(logits):
            nll, confident = kernels.token_losses(logits, targets)
        else:
            nll = token_nll(logits, targets, "sum")
            confident = confidence(logits, targets) if penalized else None
        return nll, confident if penalized else torch.zeros_like(nll)

    parts = _parts(net, hidden, targets)
    if len(parts) == 1:
        return of(hidden, targets)
    sums = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    nll, confident = (torch.stack(each).sum() for each in zip(*sums, strict=True))
    return nll, confident


def nll_in_parts(net: RecurrentLM, hidden: Hidden, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target [B * T], in nats, with as few logits at a time; no gradients.

    The arguments are those of :func:`summed_losses`.
    """
    parts = _parts(net, hidden, targets)
    return torch.cat([token_nll(net.logits(some), their).view(their.shape) for some, their in parts], 1).flatten()


def _parts(net: RecurrentLM, hidden: Hidden, targets: Tensor) -> list[tuple[Hidden, Tensor]]:
    """Return ``hidden`` and ``targets`` in parts with at most :data:`MOST_LOGITS`; with counts a span of each row."""
    places, unit = max(1, MOST_LOGITS // net.head.out_features), SPAN
    if targets.numel() <= places:
        return [(hidden, targets)]
    if hidden.counted is None:  # no place depends on another
        hidden, targets, unit = Hidden(hidden.x.flatten(0, 1)[None]), targets.flatten()[None], 1
    rows, length = targets.shape
    size = max(unit, places // rows // unit * unit)
    starts = [(start, min(size, length - start)) for start in range(0, length, size)]
    return [(hidden.narrow(*part), targets.narrow(1, *part)) for part in starts]


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return minus the entropy of the predictions, in nats, summed over the scored places: [B, T, N] to a scalar.

    A share of it in the loss keeps a model that knows its text by heart from being as sure of a new one ("confidence
    penalty", Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions").
    """
    logs = F.log_softmax(_rows(logits), dim=-1)
    by_place = (logs.exp() * logs).sum(-1)
    return by_place.masked_fill(targets.flatten() == IGNORE_INDEX, 0).sum()


def confidence_weight(share: float, step: int, planned_steps: int | None) -> float:
    """Return the weight of :func:`confidence` at update ``step`` (from 0).

    It rises in a straight line to ``share`` at ``planned_steps``: at first there is nothing to be too sure of. Where
    that is None, it is ``share`` from the start.
    """
    return share if planned_steps is None else share * min(1.0, step / planned_steps)


def _rows(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
