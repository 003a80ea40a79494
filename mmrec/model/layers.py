"""The layers that are not recurrent: causal convolution, normalization, and the feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrec.model.ops import dispatch


class CausalConv(nn.Module):
    """Depth-wise convolution over the last C tokens, its past given and returned. [B, T, channels]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the inputs before the first token, [rows, C - 1, channels]."""
        channels, width = self.weight.shape
        return torch.zeros(rows, width - 1, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, past: Tensor, reset_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return dispatch.causal_conv(x, past, self.weight, reset_mask)


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension.

    Args:
        dim: the size of that dimension.
        feeds_product: only matrix products read the result, which may then be of autocast's dtype.
    """

    EPSILON = 1e-6

    def __init__(self, dim: int, feeds_product: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.feeds_product = feeds_product

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, self.EPSILON, self.feeds_product)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): [B, T, D] to the same.

    Args:
        dim: D.
        ffn_dim: inner width, F.
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.output = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.swiglu_linear(self.project(x), self.output)
