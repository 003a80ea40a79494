"""Chunked forms of the recurrences of :mod:`mmrec.model.ops.reference`: same arguments, same results.

Both split the tokens into chunks, work inside all chunks at once, and walk over the chunks only to pass the
state on. Everything is computed in the dtype of ``state`` (float32 in training, whatever the inputs' dtype).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmrec.model.ops import reference
from mmrec.model.ops.reference import LRU_EPSILON

LOG2E = math.log2(math.e)
"""Powers of two take a third of the time of torch's exp on a CPU."""


def rg_lru(
    r: Tensor, i: Tensor, z: Tensor, rate: Tensor, state: Tensor, reset_mask: Tensor | None = None, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Chunked form of :func:`mmrec.model.ops.reference.rg_lru`; ``chunk`` is in tokens."""
    dtype = state.dtype
    r, i, z, rate = r.to(dtype), i.to(dtype), z.to(dtype), rate.to(dtype)
    if z.shape[1] == 1:  # decoding: a chunk would be mostly padding
        return reference.rg_lru(r, i, z, rate, state, reset_mask)
    outputs: Tensor = _RGLRU.apply(r, i, z, rate, state, reset_mask, chunk)
    # The state is a copy: a view would keep the whole sequence in memory, and in checkpoints.
    return outputs, outputs[:, -1].clone()


class _RGLRU(torch.autograd.Function):
    """Gates and recurrence in one: autograd would make twice the passes, and keep every step of the loop."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, i: Tensor, z: Tensor, rate: Tensor, state: Tensor, reset_mask: Tensor | None, chunk: int
    ) -> Tensor:
        r, i = r.sigmoid(), i.sigmoid()
        root = torch.mul(r, -2 * rate).expm1_().neg_().add_(LRU_EPSILON)
        inverse = root.rsqrt()  # and from it the root: torch's sqrt takes six times as long
        root.mul_(inverse)
        kept = torch.mul(r, -LOG2E * rate).exp2_()
        decay = kept if reset_mask is None else kept.masked_fill(reset_mask.unsqueeze(-1), 0)
        outputs = _scan(decay, torch.mul(root, i).mul_(z), state, chunk)
        ctx.save_for_backward(r, i, z, rate, state, reset_mask, kept, root, inverse, decay, outputs)
        ctx.chunk = chunk
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        r, i, z, rate, state, reset_mask, kept, root, inverse, decay, outputs = ctx.saved_tensors
        # The gradient runs the same recurrence from the end: d_t = grad_t + decay_{t+1} d_{t+1}.
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        flow = _scan(later, grad, torch.zeros_like(state), ctx.chunk, backwards=True)
        to_decay = torch.cat([state.unsqueeze(1), outputs[:, :-1]], dim=1).mul_(flow)
        if reset_mask is not None:
            to_decay.masked_fill_(reset_mask.unsqueeze(-1), 0)
        to_state = decay[:, 0] * flow[:, 0]
        to_inputs = flow * root  # of what the input gate lets in
        to_z, to_i = to_inputs * i, to_inputs.mul_(z)
        # The root falls by a / root as the decay a grows.
        to_decay.addcmul_(flow.mul_(z).mul_(i), inverse * kept, value=-1)
        to_log = to_decay.mul_(kept)
        to_rate = -torch.mul(to_log, r).sum((0, 1))
        to_r = torch.ops.aten.sigmoid_backward(to_log.mul_(-rate), r)
        return to_r, torch.ops.aten.sigmoid_backward(to_i, i), to_z, to_rate, to_state, None, None


def _scan(decay: Tensor, inputs: Tensor, state: Tensor, chunk: int, backwards: bool = False) -> Tensor:
    """Return ``h_t = decay_t * h_{t-1} + inputs_t``, or, backwards, ``h_t = decay_t * h_{t+1} + inputs_t``."""
    rows, length, channels = inputs.shape
    extra = -length % chunk
    if extra:
        decay, inputs = pad(decay, (0, 0, 0, extra), value=1.0), pad(inputs, (0, 0, 0, extra))
    parts = (rows, (length + extra) // chunk, chunk, channels)
    decay, outputs = decay.reshape(parts), inputs.reshape(parts).clone()
    product = decay.clone()
    out, prod, dec = (x.unbind(2)[:: -1 if backwards else 1] for x in (outputs, product, decay))
    for t in range(1, chunk):  # inside all chunks at once, each from the zero state
        out[t].addcmul_(dec[t], out[t - 1])
        prod[t].mul_(prod[t - 1])
    if inputs.device.type == "cpu":
        before = torch.empty_like(outputs[:, :, 0])
        for n in range(parts[1])[:: -1 if backwards else 1]:  # the state on entering each chunk
            before[:, n] = state
            state = torch.addcmul(out[-1][:, n], prod[-1][:, n], state)
    else:
        before = _entering_states(out[-1], prod[-1], state, backwards)
    return outputs.addcmul_(product, before.unsqueeze(2)).view(rows, length + extra, channels)[:, :length]


def _entering_states(outputs: Tensor, decay: Tensor, state: Tensor, backwards: bool) -> Tensor:
    """Return the state on entering each chunk, in a number of operations that grows with the logarithm of theirs.

    A scan by doubling (Hillis and Steele 1986): on a GPU, where the walk over the chunks costs a launch or two each.

    Args:
        outputs: [B, n, D]: the state that each chunk leaves from the zero state.
        decay: [B, n, D]: the share of the entering state that it keeps.
        state: [B, D], before the first chunk, or, ``backwards``, after the last.
        backwards: the last chunk comes first.
    """
    if backwards:
        return _entering_states(outputs.flip(1), decay.flip(1), state, False).flip(1)
    entering, kept = torch.cat([state.unsqueeze(1), outputs[:, :-1]], dim=1), decay[:, :-1]
    kept = pad(kept, (0, 0, 1, 0))  # nothing enters before the state that is given
    step = 1
    while step < entering.shape[1]:
        moved = torch.addcmul(entering[:, step:], kept[:, step:], entering[:, :-step])
        product = kept[:, step:] * kept[:, :-step]
        entering = torch.cat([entering[:, :step], moved], dim=1)
        kept = torch.cat([kept[:, :step], product], dim=1)
        step *= 2
    return entering


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Chunked form of :func:`mmrec.model.ops.reference.gated_delta_rule`; ``chunk`` in tokens, a power of two.

    Inside a chunk the corrections depend on each other through a unit lower triangular system, solved once
    by its inverse (the WY form; Yang et al. 2024). From chunk to chunk the state then moves by one affine
    map, ``S' = M S + N``, so that the walk over chunks is one matrix product a step.
    """
    dtype = state.dtype
    rows, heads, length, _ = q.shape
    q, k, v, log_decay, beta = (x.to(dtype) for x in (q, k, v, log_decay, beta))
    if length == 1:
        with _precise(state):
            return _delta_step(q, k, v, log_decay, beta, state)
    extra = -length % chunk
    if extra:  # beta 0 and decay 1: tokens that change nothing
        q, k, v = (pad(x, (0, 0, 0, extra)) for x in (q, k, v))
        log_decay, beta = pad(log_decay, (0, extra)), pad(beta, (0, extra))
    chunks = (length + extra) // chunk
    q, k, v = (x.reshape(rows * heads, chunks, chunk, x.shape[-1]) for x in (q, k, v))
    beta = beta.reshape(rows * heads, chunks, chunk, 1)
    decay = _running_sums(log_decay.reshape(rows * heads, chunks, chunk))  # from the start of the chunk, in logs
    with _precise(state):
        outputs, memory = _DeltaRule.apply(q, k, v, decay, beta, state.reshape(rows * heads, *state.shape[2:]))
    outputs = outputs.view(rows, heads, chunks * chunk, v.shape[-1])[:, :, :length]
    return outputs, memory.view(state.shape)


def _running_sums(x: Tensor) -> Tensor:
    """Return the sums over the last dimension up to each place, the same bits at each run.

    torch's cumsum of floats is not deterministic on CUDA.
    """
    if x.device.type == "cpu":
        return x.cumsum(-1)
    length = x.shape[-1]
    before = torch.ones(length, length, dtype=x.dtype, device=x.device).tril_()
    return (x.unsqueeze(-2) * before).sum(-1)


def _precise(state: Tensor) -> torch.autocast:
    """Keep mixed precision out: it would make the matrix products, and with them the state, coarse."""
    return torch.autocast(state.device.type, enabled=False)


class _DeltaRule(torch.autograd.Function):
    """The gated delta rule over whole chunks; the gradient is written out, as autograd's takes half as long again.

    With A = (q k^T) G and L = strictly lower (beta k k^T) G, where G_ij = exp(decay_i - decay_j) for i >= j:
    [U, W] = (I + L)^-1 [beta v, beta exp(decay) k], and for the memory S on entering a chunk
    o = A U + (exp(decay) q - A W) S and S' = (exp(decay_C) I - E^T W) S + E^T U, with E = exp(decay_C - decay) k.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        size, values = q.shape[2], v.shape[-1]
        # Above the diagonal the difference is positive, and its power may overflow.
        between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).clamp_max_(0).mul_(LOG2E).exp2_().tril_()
        from_start = decay.exp().unsqueeze(-1)
        to_end = (decay[..., -1:] - decay).exp().unsqueeze(-1)
        strong = beta * k
        products = (torch.cat([q, strong], dim=2) @ k.mT).unflatten(2, (2, size)).mul_(between.unsqueeze(2))
        seen, coupling = products[:, :, 0], products[:, :, 1].tril(-1)
        inverse = _unit_lower_inverse(coupling)
        solved = inverse @ torch.cat([beta * v, from_start * strong], dim=-1)
        read = seen @ solved
        query = torch.addcmul(-read[..., values:], from_start, q)
        end_keys = to_end * k
        moved = end_keys.mT @ solved
        move = moved[..., values:].neg()
        move.diagonal(dim1=-2, dim2=-1).add_(from_start[:, :, -1])
        entering = torch.empty_like(moved[..., :values])
        for n in range(entering.shape[1]):
            entering[:, n] = state
            state = torch.baddbmm(moved[:, n, :, :values], move[:, n], state)
        outputs = (query @ entering).add_(read[..., :values])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(
                q, k, v, decay, beta, seen, coupling, between, inverse, solved, query, move, entering
            )
        return outputs, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        q, k, v, decay, beta, seen, coupling, between, inverse, solved, query, move, entering = ctx.saved_tensors
        size, values = q.shape[2], v.shape[-1]
        from_start = decay.exp().unsqueeze(-1)
        to_end = (decay[..., -1:] - decay).exp().unsqueeze(-1)
        strong, end_keys = beta * k, to_end * k
        update, forget = solved[..., :values], solved[..., values:]

        # Backwards over the chunks: the gradient of the state that leaves each of them.
        flows = query.mT @ grad
        leaving = torch.empty_like(entering)
        for n in reversed(range(entering.shape[1])):
            leaving[:, n] = grad_state
            grad_state = torch.baddbmm(flows[:, n], move[:, n].mT, grad_state)

        corrections = update - forget @ entering
        to_corrections = (seen.mT @ grad).add_(end_keys @ leaving)
        to_query = grad @ entering.mT
        to_seen = grad @ corrections.mT
        to_end_keys = corrections @ leaving.mT
        to_solved = torch.cat([to_corrections, to_corrections @ entering.mT.neg()], dim=-1)
        to_right = inverse.mT @ to_solved
        to_coupling = (to_right @ solved.mT).tril_(-1).neg_()
        to_value, to_key = to_right[..., :values], to_right[..., values:]

        # The gradient of the exponents of G, and then, through G, of the products of queries and keys.
        to_exponents = torch.addcmul(to_coupling * coupling, to_seen, seen)
        to_products = torch.cat([to_seen.mul_(between), to_coupling.mul_(between)], dim=2)
        by_keys = to_products @ k
        to_q, to_strong = by_keys[:, :, :size], by_keys[:, :, size:].addcmul(from_start, to_key)
        to_k = to_products.mT @ torch.cat([q, strong], dim=2)
        to_q = to_q.addcmul(from_start, to_query)
        to_k.addcmul_(beta, to_strong).addcmul_(to_end, to_end_keys)

        to_beta = ((to_strong * k).sum(-1, keepdim=True)).add_((to_value * v).sum(-1, keepdim=True))
        ends = (to_end_keys * end_keys).sum(-1)
        to_decay = to_exponents.sum(-1) - to_exponents.sum(-2) - ends
        to_decay += (torch.addcmul(to_query * q, to_key, strong) * from_start).sum(-1)
        to_decay[..., -1] += ends.sum(-1) + from_start[:, :, -1, 0] * (entering * leaving).sum((-1, -2))
        return to_q, to_k, beta * to_value, to_decay, to_beta, grad_state


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule, for decoding: the arguments of the chunked form with T = 1."""
    state = state * log_decay.unsqueeze(-1).exp()
    correction = beta.unsqueeze(-1) * (v - k @ state)
    state = state + k.transpose(-1, -2) @ correction
    return q @ state, state


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """Return ``(I + L)^-1`` for strictly lower triangular L, [..., C, C] with C a power of two.

    Blocks on the diagonal are inverted first and merged two by two:
    ``[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]``. Only matrix products, and as stable as forward
    substitution, which powers of the whole L are not.
    """
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
    return inverse
