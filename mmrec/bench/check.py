"""Fast paths against their plain references: an op that computes something else is not worth timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.core.errors import UserError
from mmrec.model.ops import dispatch, reference

TOLERANCE = 1e-3
"""Of float32, relative to the largest number of each result."""
EPSILON = 1e-6
Results = tuple[Tensor, ...]


class OpCase(NamedTuple):
    """An op with inputs.

    Attributes:
        chosen: what the model computes, as dispatch chooses it.
        plain: the reference.
        inputs: of both, each with a gradient.
    """

    chosen: Callable[..., Results]
    plain: Callable[..., Results]
    inputs: list[Tensor]


def op_cases(rows: int, length: int, heads: int, size: int) -> dict[str, OpCase]:
    """Return every op of a layer, by name, with random inputs of ``heads`` of ``size`` and a random state."""
    random, width = torch.Generator().manual_seed(0), heads * size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random)

    def conv(channels: int) -> list[Tensor]:
        return [normal(rows, 3, channels), normal(channels, 4) / 2]

    gates = [-normal(rows, length, heads).abs(), 2 * normal(rows, length, heads).sigmoid()]
    lru = [normal(rows, length, 3 * width), normal(width).exp(), normal(2, width), normal(rows, width)]
    rule = [normal(rows, length, 3 * width), *gates, normal(rows, heads, size, size)]
    wide, square = normal(rows, length, 2 * width), normal(width, width) * width**-0.5
    headed = normal(rows, length, heads, size)
    return {
        "rg_lru": OpCase(_lru, _plain_lru, [*lru, *conv(width)]),
        "gated_delta_rule": OpCase(_rule, _plain_rule, [*rule, *conv(3 * width)]),
        "delta_gates": OpCase(_gates, _plain_gates, [normal(rows, length, 2 * heads), normal(3, heads)]),
        "rms_norm": OpCase(_norm, _plain_norm, [wide, normal(2 * width)]),
        "swiglu_linear": OpCase(_swiglu, _plain_swiglu, [wide, square]),
        "normed_linear": OpCase(_normed, _plain_normed, [headed, normal(size), wide, square]),
    }


def check_ops(length: int = 200, device: str = "cpu") -> dict[str, float]:
    """Compare outputs, final state and all gradients of every op, on ``length`` tokens from a state that is not zero.

    What is compared is what the model computes with on ``device``: kernels, where there are such.

    Returns:
        The largest relative difference of each op.

    Raises:
        UserError: one differs.
    """
    found = {name: _difference(case, device) for name, case in op_cases(2, length, 2, 16).items()}
    for name, difference in found.items():
        if not difference < TOLERANCE:
            raise UserError(
                f"{name}: the fast path differs from the reference by {difference:.1e} of the largest number; "
                f"nothing is timed before that is repaired"
            )
    return found


def _lru(x: Tensor, rate: Tensor, biases: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Results:
    z, r, i = x.chunk(3, dim=-1)
    return dispatch.conv_rg_lru((r, i), (biases[0], biases[1]), z, (past, weight), rate, state, None)


def _plain_lru(x: Tensor, rate: Tensor, biases: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Results:
    z, r, i = x.chunk(3, dim=-1)
    z, after = reference.causal_conv(z, past, weight)
    return *reference.rg_lru(r + biases[0], i + biases[1], z, rate, state), after


def _rule(qkv: Tensor, decay: Tensor, beta: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Results:
    return dispatch.conv_gated_delta_rule(qkv, (past, weight), (decay, beta), state)


def _plain_rule(qkv: Tensor, decay: Tensor, beta: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Results:
    convolved, after = reference.causal_conv(qkv, past, weight)
    q, k, v = reference.split_heads(convolved, state.shape[1])
    q, k = reference.l2_normalize(q), reference.l2_normalize(k)
    o, memory = reference.gated_delta_rule(q, k, v, decay.mT, beta.mT, state)
    return o.transpose(1, 2), memory, after


def _given(logits: Tensor, vectors: Tensor) -> reference.DeltaGates:
    decay, beta = logits.chunk(2, dim=-1)
    return reference.DeltaGates(decay, beta, *vectors)


def _gates(logits: Tensor, vectors: Tensor) -> Results:
    return dispatch.delta_gates(_given(logits, vectors), 1.0, vectors.dtype, None)


def _plain_gates(logits: Tensor, vectors: Tensor) -> Results:
    return reference.delta_gates(_given(logits, vectors), vectors.dtype)


def _norm(x: Tensor, weight: Tensor) -> Results:
    return (dispatch.rms_norm(x, weight, EPSILON),)


def _plain_norm(x: Tensor, weight: Tensor) -> Results:
    return (reference.rms_norm(x, weight, EPSILON),)


def _linear(weight: Tensor) -> nn.Linear:
    """Return a linear map whose weight is the tensor itself: its gradient is wanted."""
    found = nn.Linear(1, 1, bias=False)
    del found.weight
    found.weight = weight
    return found


def _swiglu(x: Tensor, weight: Tensor) -> Results:
    return (dispatch.swiglu_linear(x, _linear(weight)),)


def _plain_swiglu(x: Tensor, weight: Tensor) -> Results:
    return (F.linear(reference.swiglu(x), weight),)


def _normed(o: Tensor, norm: Tensor, wide: Tensor, weight: Tensor) -> Results:
    gate, _ = wide.chunk(2, dim=-1)
    return (dispatch.normed_linear(o, (norm, EPSILON), gate, False, _linear(weight), o.dtype),)


def _plain_normed(o: Tensor, norm: Tensor, wide: Tensor, weight: Tensor) -> Results:
    gate, _ = wide.chunk(2, dim=-1)
    return (F.linear(reference.rms_norm(o, norm, EPSILON).flatten(2) * gate.sigmoid(), weight),)


def results_of(op: Callable[..., Results], inputs: list[Tensor]) -> list[Tensor]:
    """Return what ``op`` makes of ``inputs``, and the gradients of those of them that it depends on."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    first, *others = found = op(*leaves)
    loss = (first * first.detach().cos()).sum() + sum(other.sum() / 2 for other in others)
    return [*(x.detach() for x in found), *torch.autograd.grad(loss, leaves)]


def _difference(case: OpCase, device: str) -> float:
    inputs = [x.to(device) for x in case.inputs]
    pairs = zip(results_of(case.chosen, inputs), results_of(case.plain, inputs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
