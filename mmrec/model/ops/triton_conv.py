"""The causal convolution as two Triton kernels: with the past, resets and, where wanted, the SiLU that follows.

:func:`mmrec.model.ops.reference.causal_conv`, of which a token sees nothing from before the last reset. Inputs are
read in whatever dtype they have, sums are float32. For the backward pass the inputs alone are kept; the recurrences
keep not even the results, but call :func:`forward` once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.ops.launch import as_bytes, on_device, row_strides, with_channels_together

TOKENS, CHANNELS = 32, 64
"""Of a program."""


@triton.jit
def _seen(x_p, past_p, row, t, d, sizes, TAPS: tl.constexpr):
    """Return the inputs at tokens ``t``, those before the first of the past; 0 outside, in float32."""
    length, width, stride_b, stride_t = sizes
    inside = (d < width)[None, :]
    is_past = ((t < 0) & (t >= 1 - TAPS))[:, None] & inside
    at = x_p + row * stride_b + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    x = tl.load(at, mask=((t >= 0) & (t < length))[:, None] & inside, other=0.0)
    before = tl.load(
        past_p + (row * (TAPS - 1) + t[:, None] + TAPS - 1) * width + d[None, :], mask=is_past, other=0.0
    )
    return tl.where(is_past, before.to(x.dtype), x).to(tl.float32)


@triton.jit
def _begins(reset_p, row, t, length, HAS_RESET: tl.constexpr):
    """Return which tokens ``t`` begin a document."""
    found = t != t  # nowhere
    if HAS_RESET:
        found = tl.load(reset_p + row * length + t.to(tl.int64), mask=(t >= 0) & (t < length), other=0) != 0
    return found


@triton.jit
def _tap(weight_p, d, back, width, TAPS: tl.constexpr):
    """Return the weights of the input ``back`` tokens ago."""
    return tl.load(weight_p + d * TAPS + TAPS - 1 - back, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def _sum(x_p, past_p, weight_p, reset_p, place, sizes, HAS_RESET: tl.constexpr, TAPS: tl.constexpr):
    """Return the convolution at a ``place``: a row, tokens and channels."""
    row, t, d = place
    total = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    other = t != t  # where a document began between the two tokens
    for back in tl.static_range(TAPS):
        if back > 0:
            other = other | _begins(reset_p, row, t - back + 1, sizes[0], HAS_RESET)
        seen = _seen(x_p, past_p, row, t - back, d, sizes, TAPS)
        total += tl.where(other[:, None], 0.0, seen) * _tap(weight_p, d, back, sizes[1], TAPS)[None, :]
    return total


@triton.jit
def _conv_forward(  # of a kernel
    x_p, past_p, weight_p, reset_p, y_p, after_p,
    length, width, stride_b, stride_t, part,
    SILU: tl.constexpr, HAS_RESET: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the outputs, [width / part, B, T, part], and the last inputs, [B, C - 1, width]."""
    row, rows = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sizes = (length, width, stride_b, stride_t)
    y = _sum(x_p, past_p, weight_p, reset_p, (row, t, d), sizes, HAS_RESET, TAPS)
    if SILU:
        y = y * tl.sigmoid(y)
    place = ((d // part) * rows + row)[None, :] * length + t.to(tl.int64)[:, None]
    place = place * part + (d % part)[None, :]
    tl.store(y_p + place, y.to(y_p.dtype.element_ty), mask=(t < length)[:, None] & (d < width)[None, :])
    if tl.program_id(1) == 0:
        one, other = tl.arange(0, 1), tl.arange(0, 1) != 0
        for back in tl.static_range(TAPS - 1):
            at = one + length - 1 - back
            if back > 0:
                other = other | _begins(reset_p, row, at + 1, length, HAS_RESET)
            kept = tl.where(other[:, None], 0.0, _seen(x_p, past_p, row, at, d, sizes, TAPS))
            last = (row * (TAPS - 1) + TAPS - 2 - back + one)[:, None] * width + d[None, :]
            tl.store(after_p + last, kept.to(after_p.dtype.element_ty), mask=(d < width)[None, :])


@triton.jit
def _conv_backward(  # of a kernel
    x_p, past_p, weight_p, reset_p, grad_p, grad_after_p, to_x_p, to_past_p, to_weight_p,
    length, width, stride_b, stride_t, part,
    SILU: tl.constexpr, HAS_RESET: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of the inputs, of the past, and of each program its share of those of the weights."""
    row, rows = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS) - (TAPS - 1)  # the past has gradients, too
    sizes = (length, width, stride_b, stride_t)
    seen = _seen(x_p, past_p, row, t, d, sizes, TAPS)
    to_seen = tl.zeros([TOKENS, CHANNELS], tl.float32)
    shares = to_weight_p + (row * tl.num_programs(1) + tl.program_id(1)) * width * TAPS + d * TAPS
    other = t != t
    for ahead in tl.static_range(TAPS):  # a token is seen by those up to C - 1 after it
        s = t + ahead
        if ahead > 0:
            other = other | _begins(reset_p, row, s, length, HAS_RESET)
        place = ((d // part) * rows + row)[None, :] * length + s.to(tl.int64)[:, None]
        place = place * part + (d % part)[None, :]
        mask = ((s >= 0) & (s < length))[:, None] & (d < width)[None, :]
        grad = tl.load(grad_p + place, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            y = _sum(x_p, past_p, weight_p, reset_p, (row, s, d), sizes, HAS_RESET, TAPS)
            opened = tl.sigmoid(y)
            grad = grad * opened * (1 + y * (1 - opened))
        grad = tl.where(other[:, None], 0.0, grad)
        to_seen += grad * _tap(weight_p, d, ahead, width, TAPS)[None, :]
        tl.store(shares + TAPS - 1 - ahead, tl.sum(grad * seen, axis=0), mask=d < width)
    # Now ``other`` says whether a document begins after the token, for those that are handed on.
    handed_on = (t >= length - (TAPS - 1)) & (t < length) & (other == 0)
    place = (row * (TAPS - 1) + t[:, None] - length + TAPS - 1) * width + d[None, :]
    inside = (d < width)[None, :]
    to_seen += tl.load(grad_after_p + place, mask=handed_on[:, None] & inside, other=0.0).to(tl.float32)
    place = (row * length + t.to(tl.int64)[:, None]) * width + d[None, :]
    tl.store(to_x_p + place, to_seen.to(to_x_p.dtype.element_ty), mask=((t >= 0) & (t < length))[:, None] & inside)
    place = (row * (TAPS - 1) + t[:, None] + TAPS - 1) * width + d[None, :]
    tl.store(to_past_p + place, to_seen.to(to_past_p.dtype.element_ty), mask=(t < 0)[:, None] & inside)


class Convolution(NamedTuple):
    """What a convolution reads, and how: the arguments of :func:`forward`.

    Attributes:
        x: [B, T, channels], with its channels side by side.
        past: [B, C - 1, channels].
        weight: [channels, C].
        reset: [B, T] of bytes: tokens that begin a document; None where none does.
        silu: the outputs pass through the SiLU.
        parts: the outputs are laid out in so many parts of equal width.
    """

    x: Tensor
    past: Tensor
    weight: Tensor
    reset: Tensor | None
    silu: bool = False
    parts: int = 1


def _launch(given: Convolution, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Return the grid for so many ``tokens``, the sizes and the constants of a launch."""
    rows, length, width = given.x.shape
    grid = (triton.cdiv(width, CHANNELS), triton.cdiv(tokens, TOKENS), rows)
    constants = {"SILU": given.silu, "HAS_RESET": given.reset is not None, "TAPS": given.weight.shape[1]}
    sizes = (length, width, *row_strides(given.x), width // given.parts)
    return grid, sizes, constants | {"TOKENS": TOKENS, "CHANNELS": CHANNELS}


def forward(given: Convolution) -> tuple[Tensor, Tensor]:
    """Return the outputs [parts, B, T, channels / parts], in the dtype of the inputs, and the last C - 1 inputs."""
    rows, length, width = given.x.shape
    grid, sizes, constants = _launch(given, length)
    y = torch.empty(given.parts, rows, length, width // given.parts, dtype=given.x.dtype, device=given.x.device)
    after = torch.empty_like(given.past)
    with on_device(given.x):
        _conv_forward[grid](*given[:4], y, after, *sizes, **constants)
    return y, after


def backward(given: Convolution, grad: Tensor, grad_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, past and weight, of those of the outputs, in their layout, and last inputs."""
    _, length, width = given.x.shape
    taps = given.weight.shape[1]
    grid, sizes, constants = _launch(given, length + taps - 1)
    to_x = torch.empty(given.x.shape, dtype=given.x.dtype, device=given.x.device)
    to_past = torch.empty_like(given.past)
    shares = torch.empty(grid[2] * grid[1], width, taps, dtype=torch.float32, device=given.x.device)
    gradients = (grad.contiguous(), grad_after.contiguous())
    with on_device(given.x):
        _conv_backward[grid](*given[:4], *gradients, to_x, to_past, shares, *sizes, **constants)
    return to_x, to_past, shares.sum(0)


class _TritonConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, past: Tensor, weight: Tensor, reset: Tensor | None, silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, past, weight, reset)
        ctx.silu = silu
        y, after = forward(Convolution(x, past, weight, reset, silu))
        return y[0], after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        x, past, weight, reset = ctx.saved_tensors
        given = Convolution(x, past, weight, reset, ctx.silu)
        return *backward(given, grad, grad_after), None, None


def causal_conv(
    x: Tensor, past: Tensor, weight: Tensor, reset_mask: Tensor | None = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.fused.causal_conv_of_documents`, followed by the SiLU where ``silu`` is set."""
    prepared = (with_channels_together(x), past.contiguous(), weight.float().contiguous())
    y, after = _TritonConv.apply(*prepared, as_bytes(reset_mask), silu)
    return y, after
