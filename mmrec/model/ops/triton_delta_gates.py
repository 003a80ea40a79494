"""The gates of the gated delta rule as two Triton kernels: decay and writing strength, with biases and resets.

Inputs are read in whatever dtype they have; arithmetic and results are float32. The inputs alone are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.ops.launch import as_bytes, on_device, row_strides, with_channels_together
from mmrec.model.ops.reference import RESET_LOG_DECAY, DeltaGates

TOKENS = 128
"""Of a program."""
RESET = tl.constexpr(RESET_LOG_DECAY)


@triton.jit
def _decay(logit, rate):
    """Return ``-rate softplus(logit)``, exact where it is close to 0."""
    power = tl.exp(-tl.abs(logit))
    above = 1 + power  # what rounding takes from the sum, the quotient gives back to its logarithm
    small = tl.where(above == 1, power, tl.log(above) * power / tl.where(above == 1, 1.0, above - 1))
    return -rate * (tl.maximum(logit, 0.0) + small)


@triton.jit
def _logit(pointer, token, h, stride, count, heads):
    mask = (token < count)[:, None] & (h < heads)[None, :]
    return tl.load(pointer + token[:, None] * stride + h[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, h, heads, GIVEN: tl.constexpr):
    found = tl.zeros([h.shape[0]], tl.float32)
    if GIVEN:
        found = tl.load(pointer + h, mask=h < heads, other=0.0).to(tl.float32)
    return found[None, :]


@triton.jit
def _gates_forward(  # of a kernel
    decay_p, beta_p, log_rate_p, decay_bias_p, beta_bias_p, reset_p, log_decay_p, strength_p,
    count, heads, stride, most,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the logarithm of the decay, and the writing strength, both [tokens, H]."""
    token, h = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HEADS)
    mask, place = (token < count)[:, None] & (h < heads)[None, :], token[:, None] * heads + h[None, :]
    rate = tl.exp(_vector(log_rate_p, h, heads, True))
    decay_bias = _vector(decay_bias_p, h, heads, True)
    log_decay = _decay(_logit(decay_p, token, h, stride, count, heads) + decay_bias, rate)
    if HAS_RESET:
        begins = tl.load(reset_p + token, mask=token < count, other=0) != 0
        log_decay = tl.where(begins[:, None], RESET, log_decay)
    tl.store(log_decay_p + place, log_decay, mask=mask)
    beta = _logit(beta_p, token, h, stride, count, heads) + _vector(beta_bias_p, h, heads, HAS_BIAS)
    tl.store(strength_p + place, most * tl.sigmoid(beta), mask=mask)


@triton.jit
def _gates_backward(  # of a kernel
    decay_p, beta_p, log_rate_p, decay_bias_p, beta_bias_p, reset_p, grad_decay_p, grad_strength_p,
    to_decay_p, to_beta_p, to_vectors_p, count, heads, stride, most,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the logits, and this program's share of those of the vectors, [programs, 3, H]."""
    token, h = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HEADS)
    mask, place = (token < count)[:, None] & (h < heads)[None, :], token[:, None] * heads + h[None, :]
    rate = tl.exp(_vector(log_rate_p, h, heads, True))
    logit = _logit(decay_p, token, h, stride, count, heads) + _vector(decay_bias_p, h, heads, True)
    grad = tl.load(grad_decay_p + place, mask=mask, other=0.0)
    if HAS_RESET:
        begins = tl.load(reset_p + token, mask=token < count, other=0) != 0
        grad = tl.where(begins[:, None], 0.0, grad)
    to_decay = -grad * rate * tl.sigmoid(logit)
    tl.store(to_decay_p + place, to_decay.to(to_decay_p.dtype.element_ty), mask=mask)
    share = tl.sigmoid(_logit(beta_p, token, h, stride, count, heads) + _vector(beta_bias_p, h, heads, HAS_BIAS))
    to_beta = tl.load(grad_strength_p + place, mask=mask, other=0.0) * most * share * (1 - share)
    tl.store(to_beta_p + place, to_beta.to(to_beta_p.dtype.element_ty), mask=mask)
    own, inside = to_vectors_p + tl.program_id(0) * 3 * heads + h, h < heads
    tl.store(own, tl.sum(grad * _decay(logit, rate), axis=0), mask=inside)
    tl.store(own + heads, tl.sum(to_decay, axis=0), mask=inside)
    tl.store(own + 2 * heads, tl.sum(to_beta, axis=0), mask=inside)


def _launch(given: DeltaGates, reset: Tensor | None) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    heads = given.decay.shape[-1]
    count = given.decay.numel() // heads
    constants: dict[str, Any] = {"HAS_BIAS": given.beta_bias is not None, "HAS_RESET": reset is not None}
    constants |= {"TOKENS": TOKENS, "HEADS": triton.next_power_of_2(heads)}
    return triton.cdiv(count, TOKENS), (count, heads, given.decay.stride(-2)), constants


class _TritonDeltaGates(torch.autograd.Function):
    """Of the bytes of resets, the greatest writing strength, and the fields of :class:`DeltaGates`."""

    @staticmethod
    def forward(ctx: Any, reset: Tensor | None, beta_max: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = DeltaGates(*inputs)
        ctx.save_for_backward(reset, *inputs)
        ctx.beta_max = beta_max
        programs, sizes, constants = _launch(given, reset)
        log_decay, strength = torch.empty(2, *given.decay.shape, dtype=torch.float32, device=given.decay.device)
        with on_device(given.decay):
            outputs = (reset, log_decay, strength)
            _gates_forward[programs,](*given, *outputs, *sizes, beta_max, **constants)
        return log_decay, strength

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_decay: Tensor, grad_strength: Tensor) -> tuple[Tensor | None, ...]:
        reset, *inputs = ctx.saved_tensors
        given = DeltaGates(*inputs)
        programs, sizes, constants = _launch(given, reset)
        to_decay, to_beta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (given.decay, given.beta))
        shares = torch.empty(programs, 3, sizes[1], dtype=torch.float32, device=to_decay.device)
        gradients = (grad_decay.contiguous(), grad_strength.contiguous(), to_decay, to_beta, shares)
        with on_device(to_decay):
            _gates_backward[programs,](*given, reset, *gradients, *sizes, ctx.beta_max, **constants)
        to_rate, to_decay_bias, to_beta_bias = shares.sum(0)
        last = None if given.beta_bias is None else to_beta_bias
        return None, None, to_decay, to_beta, to_rate, to_decay_bias, last


def delta_gates(given: DeltaGates, beta_max: float, reset_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.dispatch.delta_gates`."""
    decay, beta = (with_channels_together(x) for x in given[:2])
    if row_strides(decay) != row_strides(beta):
        decay, beta = decay.contiguous(), beta.contiguous()
    found: tuple[Tensor, Tensor] = _TritonDeltaGates.apply(as_bytes(reset_mask), beta_max, decay, beta, *given[2:])
    return found
