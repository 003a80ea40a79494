"""Runs the kernels by Triton's interpreter, on the CPU, against the references in float64: a program of its own.

``TRITON_INTERPRET=1 python -m kernels.interpret`` prints, a line of JSON for each case, how far the outputs, the
final state and each gradient are from the reference, relative to their norms.
"""

from __future__ import annotations

import builtins
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from mmrec.model.ops import reference

Op = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One run of an op.

    Attributes:
        op: its name.
        length: T.
        dtype: of what it multiplies, or of the inputs.
        resets: some tokens begin a document.
        negative: beta is in 0..2.
        gradients: they are compared, too; without, the op may take another kernel.
    """

    op: str
    length: int
    dtype: torch.dtype = torch.float32
    resets: bool = False
    negative: bool = False
    gradients: bool = True

    @property
    def name(self) -> str:
        parts = [self.op, str(self.length), str(self.dtype).removeprefix("torch.")]
        flags = {"resets": self.resets, "negative": self.negative, "no gradients": not self.gradients}
        return ", ".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])


CASES = [
    *(Case("rg_lru", length) for length in (1, 7, 29)),
    Case("rg_lru", 29, resets=True),
    Case("rg_lru", 29, torch.float16, resets=True),
    Case("gated_delta_rule", 1, gradients=False),
    Case("gated_delta_rule", 5, gradients=False, negative=True),
    Case("gated_delta_rule", 67, negative=True),
    Case("gated_delta_rule", 33, resets=True),
    Case("gated_delta_rule", 33, torch.float16, negative=True),
]


class _Counter(int):
    """A number of a loop: an int in the interpreter, of which a kernel expects what a number of the compiler has."""

    def to(self, dtype: Any) -> Any:
        return interpreter._implicit_cvt(int(self)).to(dtype)


def _keep_kind(name: str) -> None:
    plain = getattr(int, name)

    def operation(self: _Counter, other: Any) -> Any:
        found = plain(self, other)
        return _Counter(found) if type(found) is int else found

    setattr(_Counter, name, operation)


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
    _keep_kind(_name)


def _range(*bounds: Any) -> Iterator[_Counter]:
    return map(_Counter, builtins.range(*(bound.__index__() for bound in bounds)))


def teach_loops() -> None:
    """Give the modules of flash-linear-attention loops whose numbers are as in the compiler."""
    for name, module in [*sys.modules.items()]:
        if name == "fla" or name.startswith("fla."):
            vars(module)["range"] = _range


def rg_lru(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Return the reference, the kernels, and inputs: in small parts, so that a row has several of each kind."""
    from mmrec.model.ops import triton_rg_lru

    triton_rg_lru.CHUNK, triton_rg_lru.BLOCK, triton_rg_lru.LEAST_SEGMENT = 4, 4, 8
    reset = torch.rand(2, case.length) < 0.2 if case.resets else None
    if reset is not None:
        reset[0, 0] = reset[1, -1] = True
    parts = torch.randn(2, case.length, 3 * 5).to(case.dtype).split(5, dim=-1)  # views, as a layer's projection has
    rate = torch.tensor([1e-6, 0.01, 0.3, 1.0, 8.0])

    def plain(r: Tensor, i: Tensor, z: Tensor, rate: Tensor, r_bias: Tensor, i_bias: Tensor, state: Tensor) -> Any:
        return reference.rg_lru(r + r_bias, i + i_bias, z, rate, state, reset)

    def kernels(r: Tensor, i: Tensor, z: Tensor, rate: Tensor, r_bias: Tensor, i_bias: Tensor, state: Tensor) -> Any:
        return triton_rg_lru.rg_lru(r, i, z, rate, state, reset, (r_bias, i_bias))

    return plain, kernels, [*parts, rate, *torch.randn(2, 5), torch.randn(2, 5)]


def gated_delta_rule(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Return the reference, the kernels, and inputs."""
    from mmrec.model.ops import fla_delta_rule

    teach_loops()
    size = 16
    q, k = torch.randn(2, 1, 2, case.length, size)
    decay, beta = -torch.rand(1, 2, case.length), torch.rand(1, 2, case.length) * (2 if case.negative else 1)
    if case.resets:
        decay[:, :, [0, case.length // 2, case.length - 1]] = -30.0

    def plain(q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        q, k = reference.l2_normalize(q) / 2, reference.l2_normalize(k)
        return reference.gated_delta_rule(q, k, *others)

    def kernels(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
        return fla_delta_rule.gated_delta_rule(q, k, v, decay, beta, state, 0.5, products=case.dtype)

    inputs = [q, k, torch.randn(1, 2, case.length, size), decay, beta, torch.randn(1, 2, size, size)]
    return plain, kernels, inputs


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def run(case: Case) -> dict[str, float]:
    """Return how far outputs, state and gradients are from those of the reference."""
    torch.manual_seed(0)
    plain, kernels, inputs = globals()[case.op](case)
    results: list[list[Tensor]] = []
    for op, leaves in ((plain, [x.double() for x in inputs]), (kernels, [x.clone() for x in inputs])):
        leaves = [x.requires_grad_(case.gradients) for x in leaves]
        outputs, state = op(*leaves)
        found = [outputs.detach(), state.detach()]
        if case.gradients:
            # Of the outputs of float64 alone, so that both have the same gradient of the loss.
            weights = results[0][:2] if results else found
            loss = (outputs * weights[0].cos()).sum() + (state * weights[1].sin()).sum()
            found += torch.autograd.grad(loss, leaves)
        results.append(found)
    differences = [apart(b, a) for a, b in zip(*results, strict=True)]
    return {"outputs": differences[0], "state": differences[1], "gradients": max(differences[2:], default=0.0)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for number in sys.argv[1:] or range(len(CASES)):
        chosen = CASES[int(number)]
        print(json.dumps({"case": chosen.name, **run(chosen)}), flush=True)
