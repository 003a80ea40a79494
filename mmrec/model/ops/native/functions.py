"""The kernels of this folder as functions of torch, with gradients; each has its torch form in ``dispatch``.

A kernel reads and writes one row of the batch. Rows are shared out over as many threads as torch computes with; what
is summed over rows is summed in their order, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.ops.native.build import Kind, is_built, library

__all__ = [
    "dropout_add",
    "is_built",
    "long_memory",
    "rms_norm",
    "short_memory",
    "swiglu",
    "takes",
]

SPAN = 32
"""Tokens from one kept state of the long memory to the next; between them it is computed once more."""
LANES = 16
"""Rows of a state of the long memory are kept as whole vectors of so many numbers, as long_memory.c has it."""
PLAIN = Tensor, torch.nn.Parameter
"""Tensors that are what their memory says."""
WORTH_THREADS = 1 << 15
"""Numbers of an input from which on a second thread pays."""


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take ``x``, of which ``dtype`` is that of the matrix products around it."""
    return type(x) in PLAIN and x.device.type == "cpu" and library(dtype) is not None


def takes_in_place(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether kernels for matrix products of ``dtype`` read and write ``tensors`` as they are, in float32."""
    return library(dtype) is not None and all(
        x is not None and type(x) in PLAIN and x.is_cpu and x.dtype is torch.float32 and x.is_contiguous()
        for x in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """:func:`mmrec.model.ops.reference.rms_norm` of float32 ``x`` [B, T, D], in ``dtype``."""
    y: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        rows, length, dim = x.shape
        y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(rows, length)
        run("rms_norm", dtype, x, length, dim, eps, x, Whole(weight), y, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, length, dim = x.shape
        to_x, to_weight = torch.empty_like(x), x.new_empty(rows, dim)
        grad = grad.contiguous()
        run("rms_norm_backward", grad.dtype, x, length, dim, x, Whole(weight), scale, grad, 0, to_x, to_weight)
        return to_x, to_weight.sum(0), None, None


def swiglu(x: Tensor) -> Tensor:
    """:func:`mmrec.model.ops.reference.swiglu` of ``x`` [B, T, 2 F]."""
    y: Tensor = _SwiGLU.apply(x)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, length, dim = x.shape
        y = x.new_empty(rows, length, dim // 2)
        run("swiglu", x.dtype, x, length, dim // 2, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        to_x = torch.empty_like(x)
        run("swiglu_backward", x.dtype, x, x.shape[1], x.shape[2] // 2, x, grad.contiguous(), to_x)
        return to_x


def dropout_add(x: Tensor, y: Tensor, dropout: float) -> Tensor:
    """Return ``x`` [B, T, D], float32, plus ``y``, of any dtype, of which a share of ``dropout`` is left out.

    The seed of each row is drawn from torch's generator, and the mask is made anew for the gradients, not kept.
    """
    total: Tensor = _DropoutAdd.apply(x, y, dropout)
    return total


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dropout: float) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        seeds = torch.randint(1 << 32, (len(x),))
        ctx.arguments = x[0].numel(), int(dropout * (1 << 32)), 1 / (1 - dropout), seeds
        total = torch.empty_like(x)
        run("dropout_add", y.dtype, x, *ctx.arguments, x, y, total)
        ctx.dtype = y.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        to_y = torch.empty_like(grad, dtype=ctx.dtype)
        run("dropout_add_backward", ctx.dtype, grad, *ctx.arguments, grad, to_y)
        return grad, to_y, None


def short_memory(
    x: Tensor,
    past: Tensor,
    state: Tensor,
    weight: Tensor,
    biases: tuple[Tensor, Tensor],
    rate: Tensor,
    reset_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RG-LRU with the convolution and the gates before it, and the output gate after it.

    Args:
        x: [B, T, 4 D]: values, recurrence gate, input gate, output gate, before biases and non-linearities.
        past: [B, C - 1, D], float32, the inputs of the convolution before the first token.
        state: [B, D], float32.
        weight: [D, C], of the convolution.
        biases: of the recurrence gate and the input gate, [D] each.
        rate: [D], not negative: the decay of an open gate, in nats a token.
        reset_mask: [B, T], bool, or None.

    Returns:
        What the output map reads, [B, T, D]; ``past`` and ``state`` after the last token.
    """
    return _ShortMemory.apply(x, past, state, weight, *biases, rate, reset_mask)  # type: ignore[no-any-return]


class _ShortMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, past, state, weight, r_bias, i_bias, rate, reset_mask = (_contiguous(each) for each in inputs)
        (rows, length, _), (dim, width), taps = x.shape, weight.shape, weight.t().contiguous()
        y, states, past_after = (
            x.new_empty(rows, length, dim),
            past.new_empty(rows, length, dim),
            torch.empty_like(past),
        )
        sizes = (length, dim, width)
        run(
            "short_memory", x.dtype, x, *sizes, x, past, state, *map(Whole, (taps, r_bias, i_bias, rate)),
            reset_mask, y, states, past_after,
        )  # fmt: skip
        ctx.save_for_backward(x, past, state, taps, r_bias, i_bias, rate, reset_mask, states)
        ctx.sizes = sizes
        return y, past_after, states[:, -1].clone()  # a view would keep the whole sequence in memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, to_past_after: Tensor, to_last: Tensor) -> tuple[Tensor | None, ...]:
        x, past, state, taps, r_bias, i_bias, rate, reset_mask, states = ctx.saved_tensors
        rows, (_, dim, width) = len(x), ctx.sizes
        to_x, to_past, to_state = torch.empty_like(x), torch.empty_like(past), to_last.clone()
        to_taps, (to_r_bias, to_i_bias, to_rate) = past.new_empty(rows, width, dim), past.new_empty(3, rows, dim)
        run(
            "short_memory_backward", x.dtype, x, *ctx.sizes, x, past, state,
            *map(Whole, (taps, r_bias, i_bias, rate)), reset_mask, states, grad.contiguous(),
            to_past_after.contiguous(), to_x, to_past, to_state, to_taps, to_r_bias, to_i_bias, to_rate,
        )  # fmt: skip
        shared = (to_taps.sum(0).t(), to_r_bias.sum(0), to_i_bias.sum(0), to_rate.sum(0))
        return to_x, to_past, to_state, *shared, None


def long_memory(
    x: Tensor,
    gate: Tensor,
    past: Tensor,
    state: Tensor,
    weights: tuple[Tensor, ...],
    form: tuple[float, float, float, bool],
    reset_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated delta rule with the convolution, the SiLU and the gates before it, and the norm and gate after it.

    Args:
        x: [B, T, 3 D + 2 H or more]: queries, keys, values, decay, beta, and what is not read here.
        gate: [B, T, D], the output gate, before its non-linearity.
        past: [B, C - 1, 3 D], float32, the inputs of the convolution before the first token.
        state: [B, H, K, V], float32.
        weights: of the convolution [3 D, C]; the decay of an open gate in nats a token, and the biases of the decay
            and of beta, [H] each; of the norm, [K].
        form: the maximum of beta, the scale of queries, the norm's epsilon; whether the output gate is SiLU.
        reset_mask: [B, T], bool, or None.

    Returns:
        What the output map reads, [B, T, D]; ``past`` and ``state`` after the last token.
    """
    return _LongMemory.apply(x, gate, past, state, *weights, reset_mask, form)  # type: ignore[no-any-return]


class LongMemoryArguments(Structure):
    """The form of a long layer and the addresses of its weights, as long_memory.c has them."""

    _fields_ = [
        *((name, c_int64) for name in ("length", "heads", "size", "width", "stride", "span")),
        *((name, c_float) for name in ("beta_max", "query_scale", "eps")),
        ("silu", c_int64),
        *((name, c_void_p) for name in ("weight", "rate", "decay_bias", "beta_bias", "norm")),
    ]


class _LongMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, form = inputs
        x, gate, past, state, weight, rate, decay_bias, beta_bias, norm, reset_mask = (
            _contiguous(each) for each in tensors
        )
        rows, length, stride = x.shape
        heads, size = state.shape[1:3]
        taps, is_learning = weight.t().contiguous(), any(ctx.needs_input_grad)
        numbers = (length, heads, size, len(taps), stride, SPAN, *form)
        shared = (taps, rate, decay_bias, beta_bias, norm)
        y, past_after, after = torch.empty_like(gate), past.clone(), state.clone()
        kept = (
            past.new_empty(rows, -(-length // SPAN), heads, size, -(-size // LANES) * LANES) if is_learning else None
        )
        layer = LongMemoryArguments(*numbers, *(each.data_ptr() for each in shared))
        run("long_memory", x.dtype, x, layer, x, gate, reset_mask, past_after, after, y, kept)
        ctx.save_for_backward(x, gate, past, kept, reset_mask, *shared)
        ctx.numbers = numbers
        return y, past_after, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, to_past_after: Tensor, to_last: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, past, kept, reset_mask, *shared = ctx.saved_tensors
        taps = shared[0]
        rows, (_, heads, size, *_) = len(x), ctx.numbers
        to_x, to_gate, to_past, to_state = (
            torch.empty_like(x),
            torch.empty_like(gate),
            torch.empty_like(past),
            to_last.clone(),
        )
        to_x[..., 3 * heads * size + 2 * heads :] = 0
        to_taps, to_norm = past.new_empty(rows, *taps.shape), past.new_zeros(rows, size)
        to_rate, to_decay_bias, to_beta_bias = past.new_zeros(3, rows, heads)
        layer = LongMemoryArguments(*ctx.numbers, *(each.data_ptr() for each in shared))
        run(
            "long_memory_backward", x.dtype, x, layer, x, gate, reset_mask, grad.contiguous(), past, kept,
            to_past_after.contiguous(), to_x, to_gate, to_past, to_state, to_taps, to_rate, to_decay_bias,
            to_beta_bias, to_norm,
        )  # fmt: skip
        sums = (each.sum(0) for each in (to_rate, to_decay_bias, to_beta_bias, to_norm))
        return to_x, to_gate, to_past, to_state, to_taps.sum(0).t(), *sums, None, None


# Calls of the library


def _contiguous(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


class Whole(NamedTuple):
    """An argument of a kernel that is the same for all rows."""

    tensor: Tensor


def run(name: str, dtype: torch.dtype, x: Tensor, *arguments: Any) -> None:
    """Call a kernel for each row of the batch.

    Args:
        name: of the kernel.
        dtype: of matrix products.
        x: its input, by whose size threads are judged.
        arguments: a tensor is given as the address of the row, one that is :class:`Whole` by its own; numbers and
            None are given as they are, structures by their address.
    """
    kernel = _kernel(name, dtype)
    fixed = [None if isinstance(each, Tensor) else _fixed(each) for each in arguments]
    moving = [
        (place, each.data_ptr(), each.stride(0) * each.element_size())
        for place, each in enumerate(arguments)
        if isinstance(each, Tensor)
    ]

    def row(number: int) -> int:
        given = fixed.copy()
        for place, start, step in moving:
            given[place] = c_void_p(start + number * step)
        return int(kernel(*given))

    threads = min(torch.get_num_threads(), len(x)) if x.numel() >= WORTH_THREADS else 1
    rows = range(len(x))
    failed = sum(_pool(threads).map(row, rows)) if threads > 1 else sum(map(row, rows))
    if failed:
        raise MemoryError(f"no memory for {name}")


def prepared(name: str, kind: Kind, *arguments: Any) -> Callable[[], None]:
    """Return a call of a kernel with the same arguments each time.

    Args:
        name: of the kernel.
        kind: the dtype of matrix products, or another library that it is in.
        arguments: tensors, contiguous, on the CPU, whose memory every call reads and writes; whole numbers, numbers
            of float32, structures, addresses and None.
    """
    kernel, given = _kernel(name, kind), []
    for each in arguments:
        if isinstance(each, Tensor) and not each.is_contiguous():
            raise ValueError("a kernel takes contiguous tensors")
        given.append(_fixed(Whole(each) if isinstance(each, Tensor) else each))

    def call(kept_alive: object = arguments) -> None:
        if kernel(*given):
            raise MemoryError(f"no memory for {name}")

    return call


def call_by_threads(calls: Sequence[Callable[[], None]]) -> None:
    """Make each of ``calls``, by a thread of its own where there are several."""
    if len(calls) == 1:
        calls[0]()
        return
    for made in [_pool(len(calls)).submit(call) for call in calls]:
        made.result()


def _fixed(argument: Any) -> Any:
    match argument:
        case Whole(tensor):
            return c_void_p(tensor.data_ptr())
        case int():
            return c_int64(argument)
        case float():
            return c_float(argument)
        case Structure():
            return byref(argument)
    return argument


def addresses(tensors: Sequence[Tensor]) -> Any:
    """Return the addresses of ``tensors`` for a kernel."""
    return (c_void_p * len(tensors))(*[each.data_ptr() for each in tensors])


def integers(numbers: Sequence[int]) -> Any:
    """Return ``numbers`` for a kernel."""
    return (c_int64 * len(numbers))(*numbers)


def addresses_and_sizes(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """Return what tells a kernel of many ``tensors``: arrays of their addresses and of their numbers' count."""
    return addresses(tensors), integers([each.numel() for each in tensors])


@cache
def _kernel(name: str, kind: Kind) -> Any:
    return getattr(library(kind), name)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mmrec-kernels")
