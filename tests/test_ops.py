"""The chunked recurrences against the plain ones, in float64: outputs, gradients, final state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmrec.model.ops import chunked, fused, reference

LENGTHS = [1, 2, 31, 32, 33, 63, 100]
Op = Callable[..., tuple[Tensor, Tensor]]


def lru_inputs(length: int) -> list[Tensor]:
    gates_and_inputs = list(torch.randn(3, 2, length, 5, dtype=torch.float64))
    rate = torch.tensor([1e-6, 0.01, 0.3, 1.0, 8.0], dtype=torch.float64)
    return [*gates_and_inputs, rate, torch.randn(2, 5, dtype=torch.float64)]


def delta_inputs(length: int, keys: int = 6, values: int = 4) -> list[Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(random(2, 3, length, keys), dim=-1) for _ in range(2))
    log_decay = -torch.rand(2, 3, length, dtype=torch.float64) * 3
    beta = 2 * torch.rand(2, 3, length, dtype=torch.float64)
    return [q, k, random(2, 3, length, values), log_decay, beta, random(2, 3, keys, values)]


Inputs = Callable[[int], list[Tensor]]
OPS: dict[str, tuple[Op, Op, Inputs, int]] = {
    "lru": (reference.rg_lru, chunked.rg_lru, lru_inputs, 1),
    "delta": (reference.gated_delta_rule, chunked.gated_delta_rule, delta_inputs, 2),
}
"""Name: the plain form, the fast form, inputs (the state last), the dimension of time in the others."""


def conv_inputs(length: int, width: int = 4) -> list[Tensor]:
    weight = torch.randn(5, width, dtype=torch.float64)
    x, past = (torch.randn(2, n, 5, dtype=torch.float64) for n in (length, width - 1))
    return [x, past, weight]


def with_gradients(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs, state = op(*leaves)
    loss = outputs.sin().sum() + (state * state.cos()).sum()
    return [outputs.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference(name: str, length: int) -> None:
    plain, fast, make, _ = OPS[name]
    inputs = make(length)
    for expected, found in zip(with_gradients(plain, inputs), with_gradients(fast, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("cut", [1, 17, 32, 40, 69])
def test_reading_in_two_parts_is_reading_at_once(name: str, cut: int) -> None:
    _, fast, make, time = OPS[name]
    *inputs, state = make(70)
    whole, after = fast(*inputs, state)

    def part(start: int, length: int) -> list[Tensor]:
        return [x.narrow(time, start, length) if x.dim() > 1 else x for x in inputs]

    first, between = fast(*part(0, cut), state)
    second, end = fast(*part(cut, 70 - cut), between)
    torch.testing.assert_close(torch.cat([first, second], dim=time), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(end, after, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", OPS)
def test_chunk_length_does_not_matter(name: str) -> None:
    _, fast, make, _ = OPS[name]
    inputs = make(50)
    expected = fast(*inputs)
    for chunk in (4, 16, 64):
        for a, b in zip(fast(*inputs, chunk=chunk), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_delta_rule_is_stable_where_all_keys_are_equal(strength: float) -> None:
    """Powers of the coupling matrix would lose every digit here; the blocked inverse must not."""
    q, _, v, _, _, state = (x.float() for x in delta_inputs(64))
    k = torch.nn.functional.normalize(torch.ones_like(q), dim=-1)
    log_decay, beta = torch.zeros(2, 3, 64), torch.full((2, 3, 64), strength)
    found = chunked.gated_delta_rule(q, k, v, log_decay, beta, state, chunk=64)
    expected = reference.gated_delta_rule(*(x.double() for x in (q, k, v, log_decay, beta, state)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_complete_forgetting_gives_finite_gradients(name: str) -> None:
    _, fast, make, _ = OPS[name]
    inputs = make(40)
    inputs[3].fill_(1e4 if name == "lru" else -1e4)
    assert all(x.isfinite().all() for x in with_gradients(fast, inputs))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
def test_fused_convolution_equals_reference(length: int, width: int) -> None:
    inputs = conv_inputs(length, width)
    expected, found = (with_gradients(op, inputs) for op in (reference.causal_conv, fused.causal_conv))
    with torch.no_grad():
        found += fused.causal_conv(*inputs)
    for a, b in zip(found, [*expected, *expected[:2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["swiglu", "rms_norm"])
@pytest.mark.parametrize("size", [(3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_fused_pieces_equal_reference(name: str, size: tuple[int, ...]) -> None:
    inputs = [torch.randn(size, dtype=torch.float64)]
    more = [torch.randn(size[-1], dtype=torch.float64)] if name == "rms_norm" else []
    options = [1e-6] if more else []
    results = []
    for module in (reference, fused):
        leaves = [x.clone().requires_grad_() for x in inputs + more]
        y = getattr(module, name)(*leaves, *options)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    with torch.no_grad():
        results[1].append(getattr(fused, name)(*inputs, *more, *options))
    for a, b in zip(results[1], [*results[0], results[0][0]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_norm_of_zeros_is_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = fused.rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not y.any()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("length", [1, 40])
def test_mixed_precision_leaves_the_memory_as_precise_as_it_was(name: str, length: int) -> None:
    _, fast, make, _ = OPS[name]
    inputs = [x.float() for x in make(length)]
    expected = fast(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fast(*inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
