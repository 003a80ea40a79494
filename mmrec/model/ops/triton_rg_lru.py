"""The RG-LRU as Triton kernels: gates, normalization, reset and recurrence in one pass, their gradients in another.

:func:`mmrec.model.ops.reference.rg_lru` with the biases of the gates inside. The inputs are read in whatever dtype
they have; all arithmetic is float32. A row of tokens is cut into segments, so that a few long rows keep a whole GPU
busy: a first kernel reduces each segment to the product of its decays and the state that it ends with from zero, and
the second goes through each segment from the state that those before it lead to. How many segments there are follows
from the sizes alone, and nothing is tuned by time: the same inputs give the same bits.

For the backward pass the three inputs and the outputs are kept: 10 bytes a token and channel where the inputs are of
16 bits. The gates are computed again, and so is the convolution before the recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.ops import triton_conv
from mmrec.model.ops.launch import as_bytes, on_device, row_strides, with_channels_together
from mmrec.model.ops.reference import LRU_EPSILON
from mmrec.model.ops.triton_conv import Convolution

CHUNK, BLOCK = 32, 32
"""Tokens and channels that a program holds at a time: with twice as many the backward pass runs out of registers."""
PROGRAMS, LEAST_SEGMENT = 528, 128
"""Programs that keep a GPU busy, four for each multiprocessor of a large one; tokens of a segment, at least."""
EPSILON = tl.constexpr(LRU_EPSILON)


@triton.jit
def _combine(decay_1, x_1, decay_2, x_2):
    """Two steps of a linear recurrence in one."""
    return decay_1 * decay_2, decay_2 * x_1 + x_2


@triton.jit
def _decay(r, rate, reset):
    """Return the open share of the recurrence gate, the decay without a reset, and the decay."""
    opened = tl.sigmoid(r)
    kept = tl.exp(-rate[None, :] * opened)
    return opened, kept, tl.where(reset[:, None], 0.0, kept)


@triton.jit
def _root(opened, rate, kept):
    """Return sqrt(1 - a^2 + epsilon) for a = kept, exact also where a is close to 1."""
    y = -2.0 * rate[None, :] * opened
    series = -y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))))
    return tl.sqrt(tl.where(y > -0.25, series, 1.0 - kept * kept) + EPSILON)


@triton.jit
def _tile(pointer, t, d, stride, size):
    """Return the numbers of tokens ``t`` and channels ``d`` of a row, in float32; 0 beyond the ends.

    ``stride`` is that between tokens, and ``size`` the numbers of tokens and of channels that there are.
    """
    mask = (t[:, None] >= 0) & (t[:, None] < size[0]) & (d[None, :] < size[1])
    offsets = t.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, d, width):
    return tl.load(pointer + d, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def _resets(pointer, row, t, length, HAS_RESET: tl.constexpr):
    """Return where the state is set to zero before tokens ``t`` of a row."""
    found = t < 0
    if HAS_RESET:
        inside = (t >= 0) & (t < length)
        found = tl.load(pointer + row * length + t.to(tl.int64), mask=inside, other=0) != 0
    return found


@triton.jit
def _steps(inputs, vectors, reset_p, place, stride, size, HAS_RESET: tl.constexpr):
    """Return the decays and inputs of the recurrence at a ``place``; beyond the end those that change nothing.

    ``inputs`` are where r, i (of one ``stride``) and z (without gaps) of the row begin, ``vectors`` the rate and the
    biases of r and i, ``place`` the row, tokens and channels, and ``size`` how many of the last two there are.
    """
    _, t, d = place
    rate, r_bias, i_bias = vectors
    r = _tile(inputs[0], t, d, stride, size) + r_bias[None, :]
    i = _tile(inputs[1], t, d, stride, size) + i_bias[None, :]
    z = _tile(inputs[2], t, d, size[1], size)
    opened, kept, decay = _decay(r, rate, _resets(reset_p, place[0], t, size[0], HAS_RESET))
    inside = (t < size[0])[:, None]
    return tl.where(inside, decay, 1.0), tl.where(inside, _root(opened, rate, kept) * tl.sigmoid(i) * z, 0.0)


@triton.jit
def _row_of(x, number, ROWS: tl.constexpr):
    """Return row ``number`` of the tile ``x`` [ROWS, any]."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == number)[:, None], x, 0.0), axis=0)


@triton.jit
def _lru_reduce_forward(  # of a kernel
    r_p, i_p, z_p, rate_p, r_bias_p, i_bias_p, reset_p, product_p, end_p,
    length, width, chunks, stride_b, stride_t,
    HAS_RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the product of each segment's decays, and the state that it ends with from zero: [B, S, D] both."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inputs = (r_p + row * stride_b, i_p + row * stride_b, z_p + row * length * width)
    vectors = (_vector(rate_p, d, width), _vector(r_bias_p, d, width), _vector(i_bias_p, d, width))
    product, state = tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        t = (segment * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
        steps = _steps(inputs, vectors, reset_p, (row, t, d), stride_t, (length, width), HAS_RESET)
        products, states = tl.associative_scan(steps, 0, _combine)
        last = _row_of(products, CHUNK - 1, CHUNK)
        state = last * state + _row_of(states, CHUNK - 1, CHUNK)
        product = product * last
    place = (row * tl.num_programs(1) + segment) * width + d
    tl.store(product_p + place, product, mask=d < width)
    tl.store(end_p + place, state, mask=d < width)


@triton.jit
def _lru_forward(  # of a kernel
    r_p, i_p, z_p, rate_p, r_bias_p, i_bias_p, reset_p, state_p, product_p, end_p, out_p,
    length, width, chunks, stride_b, stride_t,
    HAS_RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the state after each token, [B, T, D]."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inputs = (r_p + row * stride_b, i_p + row * stride_b, z_p + row * length * width)
    vectors = (_vector(rate_p, d, width), _vector(r_bias_p, d, width), _vector(i_bias_p, d, width))
    state = _vector(state_p + row * width, d, width)
    for before in range(0, segment):
        place = (row * tl.num_programs(1) + before) * width
        state = _vector(product_p + place, d, width) * state + _vector(end_p + place, d, width)
    for chunk in range(0, chunks):
        t = (segment * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
        steps = _steps(inputs, vectors, reset_p, (row, t, d), stride_t, (length, width), HAS_RESET)
        products, states = tl.associative_scan(steps, 0, _combine)
        states = products * state[None, :] + states
        mask = (t < length)[:, None] & (d < width)[None, :]
        tl.store(out_p + (row * length + t.to(tl.int64)[:, None]) * width + d[None, :], states, mask=mask)
        state = _row_of(states, CHUNK - 1, CHUNK)


@triton.jit
def _later(r_p, grad_p, vectors, reset_p, place, stride, size, HAS_RESET: tl.constexpr):
    """Return the decays and the inputs of the recurrence of the gradients of a row, which runs from the end.

    The gradient of the state after a token is that of its output and, times the next token's decay, that of the state
    after the next one.
    """
    row, t, d = place
    r = _tile(r_p, t + 1, d, stride, size) + vectors[1][None, :]
    _, _, decay = _decay(r, vectors[0], _resets(reset_p, row, t + 1, size[0], HAS_RESET))
    return tl.where((t + 1 < size[0])[:, None], decay, 1.0), _tile(grad_p, t, d, size[1], size)


@triton.jit
def _lru_reduce_backward(  # of a kernel
    r_p, grad_p, rate_p, r_bias_p, reset_p, product_p, end_p,
    length, width, chunks, stride_b, stride_t,
    HAS_RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the same of the recurrence of the gradients."""
    segment, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    vectors = (_vector(rate_p, d, width), _vector(r_bias_p, d, width))
    r_p, grad_p = r_p + row * stride_b, grad_p + row * length * width
    product, flow = tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        t = (segment * chunks + chunks - 1 - chunk) * CHUNK + tl.arange(0, CHUNK)
        later = _later(r_p, grad_p, vectors, reset_p, (row, t, d), stride_t, (length, width), HAS_RESET)
        products, flows = tl.associative_scan(later, 0, _combine, reverse=True)
        first = _row_of(products, 0, CHUNK)
        flow = first * flow + _row_of(flows, 0, CHUNK)
        product = product * first
    place = (row * tl.num_programs(1) + segment) * width + d
    tl.store(product_p + place, product, mask=d < width)
    tl.store(end_p + place, flow, mask=d < width)


@triton.jit
def _lru_backward(  # of a kernel
    r_p, i_p, z_p, rate_p, r_bias_p, i_bias_p, reset_p, state_p, out_p, grad_p, grad_state_p, product_p, end_p,
    to_r_p, to_i_p, to_z_p, to_state_p, to_vectors_p,
    length, width, chunks, stride_b, stride_t,
    HAS_RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of the inputs [B, T, D], of the state [B, D], and of each segment [B, S, 3, D] the sums
    of those of the rate and of both biases.
    """  # noqa: D205
    segment, segments, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    d, size = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), (length, width)
    r_p, i_p = r_p + row * stride_b, i_p + row * stride_b
    z_p, out_p, grad_p = z_p + row * length * width, out_p + row * length * width, grad_p + row * length * width
    rate, r_bias, i_bias = _vector(rate_p, d, width), _vector(r_bias_p, d, width), _vector(i_bias_p, d, width)
    to_rate, to_r_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    to_i_bias = tl.zeros([BLOCK], tl.float32)
    initial = _vector(state_p + row * width, d, width)
    flow = _vector(grad_state_p + row * width, d, width)
    for after in range(0, segments - 1 - segment):
        place = (row * segments + segments - 1 - after) * width
        flow = _vector(product_p + place, d, width) * flow + _vector(end_p + place, d, width)
    for chunk in range(0, chunks):
        t = (segment * chunks + chunks - 1 - chunk) * CHUNK + tl.arange(0, CHUNK)
        later = _later(r_p, grad_p, (rate, r_bias), reset_p, (row, t, d), stride_t, size, HAS_RESET)
        products, flows = tl.associative_scan(later, 0, _combine, reverse=True)
        flows = products * flow[None, :] + flows
        flow = _row_of(flows, 0, CHUNK)
        mask = (t < length)[:, None] & (d < width)[None, :]
        flows = tl.where(mask, flows, 0.0)

        r = _tile(r_p, t, d, stride_t, size) + r_bias[None, :]
        i = tl.sigmoid(_tile(i_p, t, d, stride_t, size) + i_bias[None, :])
        z = _tile(z_p, t, d, width, size)
        opened, kept, decay = _decay(r, rate, _resets(reset_p, row, t, length, HAS_RESET))
        root = _root(opened, rate, kept)
        before = tl.where((t == 0)[:, None], initial[None, :], _tile(out_p, t - 1, d, width, size))

        entering = flows * root
        to_z, to_i = entering * i, entering * z * i * (1 - i)
        # The root falls by a / root as the decay a grows; a reset keeps the decay from the state, not from the root.
        to_kept = flows * tl.where(decay == 0.0, 0.0, before) - flows * z * i * kept / root
        to_log = to_kept * kept
        to_r = -rate[None, :] * to_log * opened * (1 - opened)
        to_rate -= tl.sum(to_log * opened, axis=0)
        to_r_bias += tl.sum(to_r, axis=0)
        to_i_bias += tl.sum(to_i, axis=0)
        place = (row * length + t.to(tl.int64)[:, None]) * width + d[None, :]
        tl.store(to_r_p + place, to_r.to(to_r_p.dtype.element_ty), mask=mask)
        tl.store(to_i_p + place, to_i.to(to_i_p.dtype.element_ty), mask=mask)
        tl.store(to_z_p + place, to_z.to(to_z_p.dtype.element_ty), mask=mask)
        if segment * chunks + chunks - 1 - chunk == 0:
            tl.store(to_state_p + row * width + d, _row_of(decay * flows, 0, CHUNK), mask=d < width)
    place = (row * segments + segment) * 3 * width + d
    tl.store(to_vectors_p + place, to_rate, mask=d < width)
    tl.store(to_vectors_p + place + width, to_r_bias, mask=d < width)
    tl.store(to_vectors_p + place + 2 * width, to_i_bias, mask=d < width)


def segments_of(rows: int, length: int, width: int) -> tuple[int, int]:
    """Return how many segments a row is cut into, and the chunks of each."""
    programs = rows * triton.cdiv(width, BLOCK)
    wanted = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(length, LEAST_SEGMENT)))
    chunks = triton.cdiv(triton.cdiv(length, wanted), CHUNK)
    return triton.cdiv(length, chunks * CHUNK), chunks


class _TritonRGLRU(torch.autograd.Function):
    """Of r, i, what the convolution reads, vectors, state, resets, and the convolution's past and weight."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, i, x, rate, r_bias, i_bias, state, reset_mask, past, weight = inputs
        z, past = _convolved(x, past, weight, reset_mask)
        rows, length, width = z.shape
        segments, chunks = segments_of(rows, length, width)
        grid = (triton.cdiv(width, BLOCK), segments, rows)
        outputs = torch.empty(rows, length, width, dtype=torch.float32, device=z.device)
        product, end = torch.empty(2, rows, segments, width, dtype=torch.float32, device=z.device)
        sizes = (length, width, chunks, *row_strides(r))
        common = {"HAS_RESET": reset_mask is not None, "CHUNK": CHUNK, "BLOCK": BLOCK}
        given = (r, i, z, rate, r_bias, i_bias, reset_mask)
        with on_device(z):
            if segments > 1:
                _lru_reduce_forward[grid](*given, product, end, *sizes, **common)
            _lru_forward[grid](*given, state, product, end, outputs, *sizes, **common)
        ctx.save_for_backward(*inputs, outputs)
        # A copy: a view would keep the whole sequence in memory, and in checkpoints.
        return outputs, outputs[:, -1].clone(), past

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor, grad_past: Tensor) -> tuple[Tensor | None, ...]:
        r, i, x, rate, r_bias, i_bias, state, reset_mask, past, weight, outputs = ctx.saved_tensors
        z, _ = _convolved(x, past, weight, reset_mask)
        rows, length, width = z.shape
        segments, chunks = segments_of(rows, length, width)
        grid = (triton.cdiv(width, BLOCK), segments, rows)
        to_r, to_i, to_z = (torch.empty(z.shape, dtype=x.dtype, device=x.device) for x in (r, i, z))
        to_state = torch.empty_like(state)
        to_vectors = torch.empty(rows, segments, 3, width, dtype=torch.float32, device=z.device)
        product, end = torch.empty(2, rows, segments, width, dtype=torch.float32, device=z.device)
        common = {"HAS_RESET": reset_mask is not None, "CHUNK": CHUNK, "BLOCK": BLOCK}
        grad, grad_state = grad.contiguous(), grad_state.contiguous()
        sizes = (length, width, chunks, *row_strides(r))
        with on_device(z):
            if segments > 1:
                _lru_reduce_backward[grid](r, grad, rate, r_bias, reset_mask, product, end, *sizes, **common)
            _lru_backward[grid](
                *(r, i, z, rate, r_bias, i_bias, reset_mask, state, outputs, grad, grad_state, product, end),
                *(to_r, to_i, to_z, to_state, to_vectors, *sizes),
                **common,
            )
        to_x, to_past, to_weight = triton_conv.backward(Convolution(x, past, weight, reset_mask), to_z, grad_past)
        return to_r, to_i, to_x, *to_vectors.sum((0, 1)), to_state, None, to_past, to_weight


def _convolved(x: Tensor, past: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    y, after = triton_conv.forward(Convolution(x, past, weight, reset))
    return y[0], after


def conv_rg_lru(
    gates: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    x: Tensor,
    conv: tuple[Tensor, Tensor],
    rate: Tensor,
    state: Tensor,
    reset_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmrec.model.ops.dispatch.conv_rg_lru`; results are float32."""
    r, i, x = (with_channels_together(part) for part in (*gates, x))
    if row_strides(r) != row_strides(i):
        r, i = r.contiguous(), i.contiguous()
    vectors = (vector.float().contiguous() for vector in (rate, *biases, state))
    past, weight = conv[0].contiguous(), conv[1].float().contiguous()
    found: tuple[Tensor, Tensor, Tensor] = _TritonRGLRU.apply(r, i, x, *vectors, as_bytes(reset_mask), past, weight)
    return found
