"""Multi-token prediction: in training alone, the token after the next one is predicted, too."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.data.batches import IGNORE_INDEX
from mmrec.model import INITIAL_SCALE, RMSNorm


class MTPHead(nn.Module):
    """Turns what a model predicts the next token from, [B, T, D], into what it predicts the one after that from.

    After Gloeckle et al. 2024 ("Better & Faster Large Language Models via Multi-token Prediction"), with the output
    layer read for both, and a linear map and a norm in place of a layer. It belongs to the training, not to the
    model: nothing but resuming needs it.

    Args:
        dim: width of the model, D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(dim, feeds_product=True)
        nn.init.normal_(self.project.weight, std=INITIAL_SCALE * dim**-0.5)  # as the model's matrices

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.project(hidden)
        normal: Tensor = self.norm(projected.to(self.norm.weight.dtype))
        return normal


def mtp_weight(share: float, step: int, planned_steps: int | None) -> float:
    """Return the weight of the second token's loss at update ``step`` (from 0).

    It falls in a straight line from ``share`` to 0 at ``planned_steps``; where that is None, it stays.
    """
    return share if planned_steps is None else share * max(0.0, 1 - step / planned_steps)


def mtp_targets(targets: Tensor) -> Tensor:
    """Return the tokens after the targets [B, T], [B, T]; IGNORE_INDEX at the last, whose successor is not known."""
    return F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)
