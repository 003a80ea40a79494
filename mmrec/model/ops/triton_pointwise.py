"""What stands between the products of a layer, as Triton kernels: the norm with its gate, and gated units.

Inputs are read in whatever dtype they have, arithmetic is float32, and for the backward pass the inputs alone are
kept. How many programs share a gradient of weights follows from the sizes: the same inputs give the same bits.

Each kernel pair is a :class:`Pointwise`, which is differentiable by itself (:func:`apply`) and before a linear map
(:func:`linear_of`), whose input then is computed once more instead of being kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmrec.model.ops.launch import on_device

NUMBERS = 1024
"""Of a tensor, that a program holds at a time."""
PROGRAMS = 528
"""That keep a GPU busy, four for each multiprocessor of a large one."""


@triton.jit
def _opening(gate, SILU: tl.constexpr):
    """Return the sigmoid of ``gate``, or its SiLU, and the slope of it."""
    share = tl.sigmoid(gate)
    opened, slope = share, share * (1 - share)
    if SILU:
        opened, slope = gate * share, share * (1 + gate * (1 - share))
    return opened, slope


@triton.jit
def _norm_forward(  # of a kernel
    x_p, weight_p, gate_p, y_p, count, width, gate_stride, eps,
    GATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the normalized rows times their weight, and times their opened gate."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (d < width)[None, :]
    x = tl.load(x_p + row[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * scale[:, None] * tl.load(weight_p + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    if GATED:
        at = (row // HEADS) * gate_stride + (row % HEADS) * width
        gate = tl.load(gate_p + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y = y * _opening(gate, SILU)[0]
    tl.store(y_p + row[:, None] * width + d[None, :], y.to(y_p.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(  # of a kernel
    x_p, weight_p, gate_p, grad_p, to_x_p, to_weight_p, to_gate_p, count, width, gate_stride, eps, blocks,
    GATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write the gradients; of the weight, the share of this program's ``blocks`` of rows."""
    d = tl.arange(0, WIDTH)
    weight = tl.load(weight_p + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    to_weight = tl.zeros([WIDTH], tl.float32)
    for block in range(0, blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (d < width)[None, :]
        place = row[:, None] * width + d[None, :]
        x = tl.load(x_p + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_p + place, mask=mask, other=0.0).to(tl.float32)
        scale = (1 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps))[:, None]
        normal = x * scale
        if GATED:
            at = (row // HEADS) * gate_stride + (row % HEADS) * width
            gate = tl.load(gate_p + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            opened, slope = _opening(gate, SILU)
            tl.store(to_gate_p + place, (grad * normal * weight * slope).to(to_gate_p.dtype.element_ty), mask=mask)
            grad = grad * opened
        to_weight += tl.sum(grad * normal, axis=0)
        grad = grad * weight
        # What a step along x would change of its own length does not reach the output.
        along = (tl.sum(grad * normal, axis=1) / width)[:, None]
        tl.store(to_x_p + place, ((grad - normal * along) * scale).to(to_x_p.dtype.element_ty), mask=mask)
    tl.store(to_weight_p + tl.program_id(0) * width + d, to_weight, mask=d < width)


@triton.jit
def _gated_forward(  # of a kernel
    value_p, gate_p, y_p, count, width, value_stride, gate_stride, SILU: tl.constexpr, NUMBERS: tl.constexpr
):
    """Write the values times their opened gates."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask, row, d = at < count, at // width, at % width
    value = tl.load(value_p + row * value_stride + d, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_p + row * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_p + at, (value * _opening(gate, SILU)[0]).to(y_p.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(  # of a kernel
    value_p, gate_p, grad_p, to_value_p, to_gate_p, count, width, value_stride, gate_stride, to_stride,
    SILU: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of values and gates, both in rows of ``to_stride``."""
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    mask, row, d = at < count, at // width, at % width
    value = tl.load(value_p + row * value_stride + d, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_p + row * gate_stride + d, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_p + at, mask=mask, other=0.0).to(tl.float32)
    opened, slope = _opening(gate, SILU)
    place = row * to_stride + d
    tl.store(to_value_p + place, (grad * opened).to(to_value_p.dtype.element_ty), mask=mask)
    tl.store(to_gate_p + place, (grad * value * slope).to(to_gate_p.dtype.element_ty), mask=mask)


class Pointwise(ABC):
    """A function of some tensors and its gradients: one kernel each."""

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the result, in the dtype that was chosen."""

    @abstractmethod
    def backward(self, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all inputs."""


class Norm(Pointwise):
    """RMS normalization of ``x`` [..., width] with ``weight`` [width], times its opened ``gate`` where there is one.

    Args:
        eps: added to the mean of the squares.
        dtype: of the result.
        silu: the gate opens by its SiLU, not its sigmoid.
    """

    def __init__(self, eps: float, dtype: torch.dtype, silu: bool = False) -> None:
        self.eps = eps
        self.dtype = dtype
        self.silu = silu

    def _launch(self, x: Tensor, gate: Tensor | None) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return rows, width and the stride of the gate; and the constants of a program, which takes rows whole."""
        width = x.shape[-1]
        whole = triton.next_power_of_2(width)
        heads = 1 if gate is None else gate.shape[-1] // width
        constants = {"GATED": gate is not None, "SILU": self.silu, "HEADS": heads}
        constants |= {"ROWS": max(1, NUMBERS // whole), "WIDTH": whole}
        return (x.numel() // width, width, 0 if gate is None else gate.stride(-2)), constants

    def forward(self, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``gate`` [tokens, heads * width], of rows ``x`` [tokens * heads, width]; or None."""
        sizes, constants = self._launch(x, gate)
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        with on_device(x):
            _norm_forward[triton.cdiv(sizes[0], constants["ROWS"]),](
                x, weight, gate, y, *sizes, self.eps, **constants
            )
        return y

    def backward(  # type: ignore[override]
        self, grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        sizes, constants = self._launch(x, gate)
        parts = triton.cdiv(sizes[0], constants["ROWS"])
        blocks = triton.cdiv(parts, PROGRAMS)
        programs = triton.cdiv(parts, blocks)
        to_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        to_x, shares = torch.empty_like(x), torch.empty(programs, sizes[1], dtype=torch.float32, device=x.device)
        given = (x, weight, gate, grad.contiguous(), to_x, shares, to_gate)
        with on_device(x):
            _norm_backward[programs,](*given, *sizes, self.eps, blocks, **constants)
        return to_x, shares.sum(0).to(weight.dtype), to_gate


class Gated(Pointwise):
    """Values times the opened gates, both [tokens, width] in rows of any stride.

    Args:
        dtype: of the result.
        silu: a gate opens by its SiLU, not its sigmoid.
    """

    def __init__(self, dtype: torch.dtype, silu: bool = False) -> None:
        self.dtype = dtype
        self.silu = silu

    def _launch(self, value: Tensor, gate: Tensor) -> tuple[int, tuple[int, ...], dict[str, Any]]:
        sizes = (value.numel(), value.shape[-1], value.stride(-2), gate.stride(-2))
        return triton.cdiv(value.numel(), NUMBERS), sizes, {"SILU": self.silu, "NUMBERS": NUMBERS}

    def forward(self, value: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        y = torch.empty(value.shape, dtype=self.dtype, device=value.device)
        programs, sizes, constants = self._launch(value, gate)
        with on_device(value):
            _gated_forward[programs,](value, gate, y, *sizes, **constants)
        return y

    def backward(self, grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        to_value, to_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, gate))
        self.write_gradients(grad, (value, gate), (to_value, to_gate))
        return to_value, to_gate

    def write_gradients(self, grad: Tensor, inputs: tuple[Tensor, ...], to_inputs: tuple[Tensor, ...]) -> None:
        """Write into ``to_inputs``, which are parts of rows of the same stride."""
        programs, sizes, constants = self._launch(*inputs)
        with on_device(grad):
            given = (*inputs, grad.contiguous(), *to_inputs)
            _gated_backward[programs,](*given, *sizes, to_inputs[0].stride(-2), **constants)


class SwiGLU(Pointwise):
    """The first half of ``x`` [tokens, 2F] times the SiLU of the second, [tokens, F]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.gated = Gated(dtype, silu=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.gated.forward(*x.chunk(2, dim=-1))

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.gated.write_gradients(grad, x.chunk(2, dim=-1), to_x.chunk(2, dim=-1))
        return (to_x,)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, *inputs: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(*inputs)
        return op.forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.op.backward(grad, *ctx.saved_tensors)


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, weight: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(weight, *inputs)
        return op.forward(*inputs).view(-1, weight.shape[1]) @ weight.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        product = ctx.op.forward(*inputs)
        to_product = (grad @ weight).view(product.shape)
        to_weight = grad.mT @ product.view(-1, weight.shape[1])
        return None, to_weight, *ctx.op.backward(to_product, *inputs)


def apply(op: Pointwise, *inputs: Tensor | None) -> Tensor:
    """Return what ``op`` makes of ``inputs``."""
    y: Tensor = _Pointwise.apply(op, *inputs)
    return y


def linear_of(op: Pointwise, weight: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return what the linear map ``weight`` [out, in] makes of what ``op`` makes of ``inputs``: [tokens, out]."""
    if not torch.is_grad_enabled():
        return F.linear(op.forward(*inputs).view(-1, weight.shape[1]), weight)  # type: ignore[arg-type]
    y: Tensor = _LinearOf.apply(op, weight, *inputs)
    return y
