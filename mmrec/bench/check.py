"""Fast paths against their plain references: an op that computes something else is not worth timing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrec.core.errors import UserError
from mmrec.model.ops import dispatch, reference

TOLERANCE = 1e-3
"""Of float32, relative to the largest number of each result."""


def check_ops(length: int = 200, device: str = "cpu") -> dict[str, float]:
    """Compare outputs, final state and all gradients of every op, on ``length`` tokens from a state that is not zero.

    What is compared is what the model computes with on ``device``: kernels, where there are such.

    Returns:
        The largest relative difference of each op.

    Raises:
        UserError: one differs.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def unit(*size: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*size), dim=-1)

    rows, heads, size = 2, 2, 16
    lru = (*(normal(rows, length, size) for _ in range(3)), normal(size).exp(), normal(rows, size))
    rule = (
        *(unit(rows, heads, length, size), unit(rows, heads, length, size), normal(rows, heads, length, size)),
        *(-normal(rows, heads, length).abs(), normal(rows, heads, length).sigmoid()),
        normal(rows, heads, size, size),
    )
    found = {
        "rg_lru": _difference(_rg_lru, reference.rg_lru, lru, device),
        "gated_delta_rule": _difference(dispatch.gated_delta_rule, _plain_rule, rule, device),
    }
    for name, difference in found.items():
        if not difference < TOLERANCE:
            raise UserError(
                f"{name}: the fast path differs from the reference by {difference:.1e} of the largest number; "
                f"nothing is timed before that is repaired"
            )
    return found


def _rg_lru(r: Tensor, i: Tensor, z: Tensor, rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(rate)
    return dispatch.rg_lru(r, i, z, rate, state, None, (zero, zero))


def _plain_rule(q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return reference.gated_delta_rule(reference.l2_normalize(q), reference.l2_normalize(k), *others)


def _difference(
    fast: Callable[..., tuple[Tensor, Tensor]],
    plain: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    device: str,
) -> float:
    results = []
    for op in (fast, plain):
        leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
        output, state = op(*leaves)
        gradients = torch.autograd.grad((output * output.detach().cos()).sum() + (state * 0.5).sum(), leaves)
        results.append((output.detach(), state.detach(), *gradients))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
