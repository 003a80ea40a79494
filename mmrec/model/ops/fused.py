"""Fused forms of :mod:`mmrec.model.ops.reference` with hand-written gradients: the same results, in fewer passes.

On a CPU these operations are bound by memory, not by arithmetic. Autograd would keep every intermediate result, fill
whole tensors with zeros for the gradient of each slice, and copy the gradients of parts together; here each gradient
is written once, where it belongs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def causal_conv(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.causal_conv`."""
    if weight.shape[1] == 1:
        return x * weight[:, 0], past
    y, after = _CausalConv.apply(x, past.to(x.dtype), weight)
    return y, after.to(past.dtype)


def causal_conv_of_documents(x: Tensor, past: Tensor, weight: Tensor, reset_mask: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv` that sees nothing from before the last token where ``reset_mask`` [B, T] (bool) is true."""
    length, kept = x.shape[1], weight.shape[1] - 1
    everything = torch.cat([past.to(x.dtype), x], dim=1)
    document = F.pad(reset_mask.cumsum(1), (kept, 0))
    y = x * weight[:, -1]
    for back in range(1, kept + 1):
        seen = slice(kept - back, kept - back + length)
        same = document[:, seen] == document[:, kept:]
        y = y + everything[:, seen] * same.unsqueeze(-1) * weight[:, -1 - back]
    still = document[:, length:] == document[:, -1:]
    return y, (everything[:, length:] * still.unsqueeze(-1)).to(past.dtype)


def _shifted(seen: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """Return the sums of C neighbouring tokens of ``seen`` [B, T, channels], each times its ``weight`` [channels, C].

    To the library it is a picture one pixel high whose channels come last, for which it has a fast form on a CPU.
    """
    picture = seen.transpose(1, 2).unsqueeze(2)
    taps = weight.to(seen.dtype)[:, None, None]
    return F.conv2d(picture, taps, padding=(0, padding), groups=len(weight)).squeeze(2).transpose(1, 2)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([past, x], dim=1)
        ctx.save_for_backward(seen, weight)
        # Copies: views would keep the whole sequence in memory.
        return _shifted(seen, weight), seen[:, x.shape[1] :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, weight = ctx.saved_tensors
        length, kept = grad.shape[1], weight.shape[1] - 1
        to_seen = _shifted(grad.contiguous(), weight.flip(1), padding=kept)
        to_seen[:, length:] += grad_after
        # One product a tap: the library's own gradient of the weights takes four times as long.
        taps = [(grad * seen[:, tap : tap + length]).sum((0, 1)) for tap in range(kept + 1)]
        return to_seen[:, kept:], to_seen[:, :kept], torch.stack(taps, dim=1).to(weight.dtype)


def swiglu(x: Tensor) -> Tensor:
    """:func:`mmrec.model.ops.reference.swiglu`."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _SwiGLU.apply(x)
        return y
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        gate = gate.contiguous()  # from a part of each row the SiLU takes twice the time
        opened = F.silu(gate)
        ctx.save_for_backward(x, gate, opened)
        return value * opened

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gate, opened = ctx.saved_tensors
        value = x.chunk(2, dim=-1)[0]
        result = torch.empty_like(x)
        to_value, to_gate = result.chunk(2, dim=-1)
        to_value.copy_(grad * opened)  # not out=to_value: torch.compile takes no parts of rows there
        to_gate.copy_(torch.ops.aten.silu_backward(grad * value, gate))
        return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`mmrec.model.ops.reference.rms_norm`."""
    if torch.is_grad_enabled():
        y: Tensor = _RMSNorm.apply(x, weight, eps)
        return y
    return _normalized(x, eps)[0] * weight


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = (length.square_().div_(x.shape[-1]).add_(eps)).rsqrt_().to(x.dtype)
    return x * scale, scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normal, scale = _normalized(x, eps)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        grad = grad.to(normal.dtype)
        product = grad * normal
        to_weight = product.flatten(0, -2).sum(0)
        # What a step along x would change of its own length does not reach the output.
        along = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(normal.shape[-1])
        to_x = torch.mul(grad, weight).addcmul_(normal, along, value=-1).mul_(scale)
        return to_x, to_weight.to(weight.dtype), None
