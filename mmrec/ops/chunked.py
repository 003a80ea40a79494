"""The recurrences of :mod:`mmrec.ops.reference`, many tokens at a time: same arguments, same results.

Both split the tokens into chunks, work inside all chunks at once, and walk over the chunks only to hand the
memory on. Everything is computed in the dtype of ``state`` (float32 in training, whatever the inputs' dtype).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def gated_linear_recurrence(
    log_decay: Tensor, inputs: Tensor, state: Tensor, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Chunked form of :func:`mmrec.ops.reference.gated_linear_recurrence`; ``chunk`` is in tokens."""
    length = inputs.shape[1]
    decay, inputs = log_decay.to(state.dtype).exp(), inputs.to(state.dtype)
    if length == 1:
        state = torch.addcmul(inputs[:, 0], decay[:, 0], state)
        return state.unsqueeze(1), state
    extra = -length % chunk
    if extra:
        decay, inputs = pad(decay, (0, 0, 0, extra), value=1.0), pad(inputs, (0, 0, 0, extra))
    outputs: Tensor = _LinearRecurrence.apply(decay, inputs, state, chunk)
    # The state is a copy: a view would keep the whole sequence in memory, and in checkpoints.
    return outputs[:, :length], outputs[:, length - 1].clone()


def _scan(decay: Tensor, inputs: Tensor, state: Tensor, chunk: int) -> Tensor:
    """``h_t = decay_t * h_{t-1} + inputs_t`` over dimension 1, whose length is a multiple of ``chunk``."""
    rows, length, channels = inputs.shape
    decay = decay.reshape(rows, length // chunk, chunk, channels)
    outputs = inputs.reshape(rows, length // chunk, chunk, channels).clone()
    product = decay.clone()
    out, prod, dec = outputs.unbind(2), product.unbind(2), decay.unbind(2)
    for t in range(1, chunk):  # inside all chunks at once, each from the zero state
        out[t].addcmul_(dec[t], out[t - 1])
        prod[t].mul_(prod[t - 1])
    before = torch.empty_like(outputs[:, :, 0])
    for n in range(before.shape[1]):  # the state on entering each chunk
        before[:, n] = state
        state = torch.addcmul(out[-1][:, n], prod[-1][:, n], state)
    return outputs.addcmul_(product, before.unsqueeze(2)).reshape(rows, length, channels)


class _LinearRecurrence(torch.autograd.Function):
    """Saves only decay and outputs: autograd through the loop would keep every step."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, state: Tensor, chunk: int) -> Tensor:
        outputs = _scan(decay, inputs, state, chunk)
        ctx.save_for_backward(decay, outputs, state)
        ctx.chunk = chunk
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        decay, outputs, state = ctx.saved_tensors
        # The gradient runs the same recurrence from the end: d_t = grad_t + decay_{t+1} d_{t+1}.
        later = torch.cat([torch.zeros_like(decay[:, :1]), decay.flip(1)[:, :-1]], dim=1)
        flow = _scan(later, grad.flip(1), torch.zeros_like(state), ctx.chunk).flip(1)
        before = torch.cat([state.unsqueeze(1), outputs[:, :-1]], dim=1)
        return flow * before, flow, decay[:, 0] * flow[:, 0], None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Chunked form of :func:`mmrec.ops.reference.gated_delta_rule`; ``chunk`` in tokens, a power of two.

    Inside a chunk the corrections depend on each other through a unit lower triangular system, solved once
    by its inverse (the WY form; Yang et al. 2024). From chunk to chunk the memory then moves by one affine
    map, ``S' = M S + N``, so that the walk over chunks is one matrix product a step.
    """
    dtype = state.dtype
    rows, heads, length, _ = q.shape
    q, k, v, log_decay, beta = (x.to(dtype) for x in (q, k, v, log_decay, beta))
    if length == 1:
        return _delta_step(q, k, v, log_decay, beta, state)
    extra = -length % chunk
    if extra:  # beta 0 and decay 1: tokens that change nothing
        q, k, v = (pad(x, (0, 0, 0, extra)) for x in (q, k, v))
        log_decay, beta = pad(log_decay, (0, extra)), pad(beta, (0, extra))
    chunks = (length + extra) // chunk
    q, k, v = (x.reshape(rows * heads, chunks, chunk, x.shape[-1]) for x in (q, k, v))
    beta = beta.reshape(rows * heads, chunks, chunk, 1)
    decay = log_decay.reshape(rows * heads, chunks, chunk).cumsum(-1)  # from the start of the chunk, in logs

    ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(ahead, float("-inf")).exp()
    from_start = decay.exp().unsqueeze(-1)
    to_end = (decay[..., -1:] - decay).exp().unsqueeze(-1)

    coupling = ((beta * k) @ k.transpose(-1, -2) * between).tril(-1)
    inverse: Tensor = _UnitLowerInverse.apply(coupling)
    solved = inverse @ torch.cat([beta * v, beta * from_start * k], dim=-1)
    update, forget = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    end_keys = (to_end * k).transpose(-1, -2)
    eye = torch.eye(k.shape[-1], dtype=dtype, device=q.device)
    move = from_start[:, :, -1:] * eye - end_keys @ forget
    add = end_keys @ update

    states = []
    memory = state.reshape(rows * heads, *state.shape[2:])
    for n in range(chunks):
        states.append(memory)
        memory = torch.baddbmm(add[:, n], move[:, n], memory)
    entering = torch.stack(states, dim=1)
    corrections = update - forget @ entering
    outputs = (from_start * q) @ entering + (q @ k.transpose(-1, -2) * between) @ corrections
    outputs = outputs.reshape(rows, heads, chunks * chunk, v.shape[-1])[:, :, :length]
    return outputs, memory.reshape(state.shape)


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule, for writing text: the arguments of the chunked form with T = 1."""
    state = state * log_decay.unsqueeze(-1).exp()
    correction = beta.unsqueeze(-1) * (v - k @ state)
    state = state + k.transpose(-1, -2) @ correction
    return q @ state, state


class _UnitLowerInverse(torch.autograd.Function):
    """``(I + L)^-1`` for strictly lower triangular L, [..., C, C] with C a power of two.

    Blocks on the diagonal are inverted first and merged two by two:
    ``[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]``. Only matrix products, and as stable as forward
    substitution, which powers of the whole L are not.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower).clone()
        block = 1
        while block < size:
            pairs = size // (2 * block)
            view = (*lower.shape[:-2], pairs, 2 * block, pairs, 2 * block)
            here = lower.reshape(view).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            done = inverse.view(view).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            top, bottom = done[..., :block, :block], done[..., block:, block:]
            done[..., block:, :block] = -(bottom @ here[..., block:, :block] @ top)
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)
