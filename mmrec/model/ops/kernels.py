"""The Triton kernels of this program, as :mod:`mmrec.model.ops.dispatch` calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrec.model.ops.triton_conv import causal_conv
from mmrec.model.ops.triton_delta_gates import delta_gates
from mmrec.model.ops.triton_pointwise import Gated, Norm, SwiGLU, apply, linear_of
from mmrec.model.ops.triton_rg_lru import conv_rg_lru

__all__ = ["causal_conv", "conv_rg_lru", "delta_gates", "gated_linear", "normed_linear", "rms_norm", "swiglu_linear"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """:func:`mmrec.model.ops.reference.rms_norm`, rounded to ``dtype``."""
    return apply(Norm(eps, dtype), x.contiguous(), weight)


def swiglu_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The linear map ``weight`` [D, F] of the gated unit of ``x`` [..., 2F], which is not kept; in ``dtype``."""
    y = linear_of(SwiGLU(dtype), weight.to(dtype), x.flatten(0, -2))
    return y.view(*x.shape[:-1], -1)


def gated_linear(h: Tensor, gate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The linear map ``weight`` of ``h`` times the sigmoid of ``gate``, both [..., D]; the product is not kept."""
    y = linear_of(Gated(dtype), weight.to(dtype), h.flatten(0, -2), gate.flatten(0, -2))
    return y.view(*h.shape[:-1], -1)


def normed_linear(
    o: Tensor, norm: tuple[Tensor, float], gate: Tensor, silu: bool, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """The linear map ``weight`` of normalized heads ``o`` [B, T, H, V] times their gate [B, T, H V]; nor is that."""
    norm_weight, eps = norm
    heads = o.contiguous().view(-1, o.shape[-1])
    y = linear_of(Norm(eps, dtype, silu), weight.to(dtype), heads, norm_weight, gate.flatten(0, -2))
    return y.view(*gate.shape[:-1], -1)
