"""The loss of predictions and minus their entropy by compiled code, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.ops.native.functions import prepared


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of the targets and minus the entropy of the predictions, in nats, summed.

    Beside :func:`mmrec.inference.metrics.token_nll` and :func:`mmrec.training.losses.confidence`, of which they are
    the sums. All is computed in float32, the sums in float64.

    Args:
        logits: [B, T, N], float32 or bfloat16.
        targets: [B, T], int64: a token, or a negative number where nothing is scored.

    Returns:
        Two scalars, float32.

    Raises:
        IndexError: a target is none of the N tokens.
    """
    nll, confident = _TokenLosses.apply(logits, targets)
    return nll, confident


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits, targets = logits.contiguous(), targets.contiguous()
        most = int(targets.max()) if targets.numel() else 0
        if most >= logits.shape[-1]:
            raise IndexError(f"the target {most} is none of the {logits.shape[-1]} tokens")
        kept, sums = torch.empty(targets.numel(), 3), torch.empty(2)
        sizes = targets.numel(), logits.shape[-1]
        prepared("token_losses", logits.dtype, *sizes, logits, targets, kept, sums)()
        ctx.save_for_backward(logits, targets, kept)
        return sums.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_nll: Tensor, to_confident: Tensor) -> tuple[Tensor, None]:
        logits, targets, kept = ctx.saved_tensors
        to_logits = torch.empty_like(logits)
        sizes, grads = (targets.numel(), logits.shape[-1]), (to_nll.contiguous(), to_confident.contiguous())
        prepared("token_losses_backward", logits.dtype, *sizes, logits, targets, kept, *grads, to_logits)()
        return to_logits, None
