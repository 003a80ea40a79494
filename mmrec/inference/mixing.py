"""A mixture of predictions by weights that are learned online: of models, and of the counts of n-grams."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrec.checkpoints.cached import DAMPING

FORGETTING = 0.98
"""Share of the curvature that a part leaves to the next."""


def features(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the mixture weighs, and which weights it takes.

    Args:
        scores: [m, T, N], log-probabilities of the models; the counts fall back on the first.
        counts: [K, T, N], of each token after the contexts of K lengths, short ones first.

    Returns:
        Features [M, T, N], M = m + K: the first model's log-probabilities, how far those of the others differ from
        them, and for each order how far its log-probabilities differ from those of the order before. An order takes
        what the one before expects for as many observations as it has seen different tokens (Witten and Bell 1991).
        And the number of orders that know the context [T], int64, which is the set of weights to take.
    """
    weighed = scores.new_zeros(len(scores) + len(counts), *scores.shape[1:])
    weighed[0] = scores[0]
    torch.sub(scores[1:], scores[0], out=weighed[1 : len(scores)])
    totals = counts.sum(-1, keepdim=True)
    known = totals.squeeze(-1) > 0
    probabilities, before = scores[0].exp(), scores[0].clone()
    for index, (count, total, is_known) in enumerate(zip(counts, totals, known, strict=True), len(scores)):
        rows = is_known.nonzero().squeeze(-1)  # long contexts are seldom known
        count = count[rows]
        kinds = (count > 0).sum(-1, keepdim=True)
        expected = (kinds * probabilities[rows]).add_(count).div_(total[rows] + kinds)
        after = expected.clamp_min(1e-30).log_()
        weighed[index, rows] = after - before[rows]
        probabilities[rows], before[rows] = expected, after
    return weighed, known.sum(0)


def mix(weights: Tensor, weighed: Tensor, sets: Tensor) -> Tensor:
    """Return the log-probabilities [T, N] of the mixture: a product of powers of the members' distributions.

    Args:
        weights: [S, M].
        weighed: [M, T, N], of :func:`features`.
        sets: [T], the weights that each position takes.
    """
    return torch.einsum("tm,mtn->tn", weights[sets].to(weighed.dtype), weighed).log_softmax(-1)


def updated_weights(
    weights: Tensor, curvature: Tensor, weighed: Tensor, sets: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights and the curvature after a part was read: a Newton step of every set that it took.

    The loss is convex in the weights, and its second derivatives are the covariances of the features; so the steps
    need no rate.

    Args:
        weights: [S, M], float64.
        curvature: [S, M, M], float64.
        weighed: [M, T, N], of :func:`features`.
        sets: [T].
        targets: [T], int64, the tokens.
    """
    probabilities = mix(weights, weighed, sets).exp()
    by_token = weighed.transpose(0, 1)  # [T, M, N]
    expected = torch.einsum("tmn,tn->tm", by_token, probabilities)
    gradient = by_token[torch.arange(len(targets)), :, targets] - expected
    apart = by_token - expected.unsqueeze(-1)
    covariance = (apart * probabilities.unsqueeze(1)) @ apart.mT
    taken, inverse = sets.unique(return_inverse=True)
    steps = torch.zeros(len(taken), weights.shape[1], dtype=torch.float64)
    steps.index_add_(0, inverse, gradient.double())
    damping = DAMPING * torch.eye(weights.shape[1], dtype=torch.float64)
    curved = FORGETTING * curvature[taken] + (1 - FORGETTING) * damping
    curved.index_add_(0, inverse, covariance.double())
    moved = weights[taken] + torch.linalg.solve(curved, steps)
    if not bool(moved.isfinite().all()):
        return weights, curvature
    weights, curvature = weights.clone(), curvature.clone()
    weights[taken], curvature[taken] = moved, curved
    return weights, curvature
