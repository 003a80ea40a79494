"""The confidence penalty of training; the loss of the tokens is :func:`mmrec.inference.metrics.token_nll`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.data.batches import IGNORE_INDEX


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
