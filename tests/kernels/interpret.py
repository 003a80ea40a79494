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
from torch.nn import functional as F
from triton.runtime import interpreter

from mmrec.model.ops import fused, reference

Op = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One run of an op.

    Attributes:
        op: its name.
        length: T.
        dtype: of what it multiplies, or of the inputs.
        resets: some tokens begin a document.
        negative: beta is in 0..2; of a convolution, a SiLU follows; of a gate, it is one.
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


WITH_GATE = ((torch.float32, False), (torch.float32, True), (torch.float16, False))
CASES = [
    # First, as they have many channels: the others then let a program hold little.
    Case("conv_gated_delta_rule", 5, resets=True, negative=True, gradients=False),
    Case("conv_gated_delta_rule", 67, negative=True),
    Case("conv_gated_delta_rule", 33, resets=True),
    Case("conv_gated_delta_rule", 33, torch.float16, negative=True),
    *(Case("conv_rg_lru", length) for length in (1, 7, 13)),
    *(Case("conv_rg_lru", 13, dtype, resets=True) for dtype in (torch.float32, torch.float16)),
    Case("causal_conv", 2, resets=True),
    *(Case("causal_conv", 13, dtype, resets=True) for dtype in (torch.float32, torch.float16)),
    Case("causal_conv", 13, negative=True),
    *(Case("rms_norm", 7, dtype) for dtype in (torch.float32, torch.float16)),
    *(Case("swiglu_linear", 7, dtype) for dtype in (torch.float32, torch.float16)),
    *(Case("gated_linear", 7, dtype) for dtype in (torch.float32, torch.float16)),
    *(Case("normed_linear", 7, dtype, negative=negative) for dtype, negative in WITH_GATE),
    Case("delta_gates", 9),
    Case("delta_gates", 9, torch.float16, resets=True, negative=True),
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


def small_parts() -> None:
    """From here on, let a program hold so little that a row has several of each kind."""
    from mmrec.model.ops import triton_conv, triton_delta_gates, triton_pointwise, triton_rg_lru

    triton_rg_lru.CHUNK, triton_rg_lru.BLOCK, triton_rg_lru.LEAST_SEGMENT = 4, 4, 8
    triton_conv.TOKENS, triton_conv.CHANNELS, triton_delta_gates.TOKENS = 8, 4, 4
    triton_pointwise.NUMBERS, triton_pointwise.PROGRAMS = 16, 2


def some_resets(case: Case, rows: int) -> Tensor | None:
    if not case.resets:
        return None
    reset = torch.rand(rows, case.length) < 0.2
    reset[0, 0] = reset[-1, -1] = True
    return reset


def plain_conv(x: Tensor, past: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    if reset is None:
        return reference.causal_conv(x, past, weight)
    return fused.causal_conv_of_documents(x, past, weight, reset)


def conv_rg_lru(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Of the whole projection of a layer; the final state is that of the convolution, too."""
    from mmrec.model.ops import kernels as own

    reset = some_resets(case, 2)

    def plain(x: Tensor, rate: Tensor, bias: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Any:
        z, r, i, _ = x.chunk(4, dim=-1)
        z, after = plain_conv(z, past, weight, reset)
        outputs, state = reference.rg_lru(r + bias[0], i + bias[1], z, rate, state, reset)
        return outputs, torch.cat([state.flatten(), after.flatten()])

    def kernels(x: Tensor, rate: Tensor, bias: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Any:
        z, r, i, _ = x.chunk(4, dim=-1)
        biases, conv = (bias[0], bias[1]), (past, weight)
        outputs, state, after = own.conv_rg_lru((r, i), biases, z, conv, rate, state, reset)
        return outputs, torch.cat([state.flatten(), after.flatten()])

    rate, conv = torch.tensor([1e-6, 0.01, 0.3, 1.0, 8.0]), [torch.randn(2, 3, 5), torch.randn(5, 4)]
    conv[0] = conv[0].to(case.dtype).float()
    x = torch.randn(2, case.length, 20).to(case.dtype)
    return plain, kernels, [x, rate, torch.randn(2, 5), torch.randn(2, 5), *conv]


def causal_conv(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Of a part of the channels, with the SiLU that may follow."""
    from mmrec.model.ops import triton_conv

    reset = some_resets(case, 2)

    def plain(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, after = plain_conv(x[..., 2:8], past, weight, reset)
        return (F.silu(y) if case.negative else y), after

    def kernels(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return triton_conv.causal_conv(x[..., 2:8], past, weight, reset, case.negative)

    past = torch.randn(2, 3, 6).to(case.dtype).float()
    return plain, kernels, [torch.randn(2, case.length, 9).to(case.dtype), past, torch.randn(6, 4)]


def without_state(op: Callable[..., Tensor]) -> Op:
    return lambda *inputs: (op(*inputs), inputs[0].new_ones(1))


def rms_norm(case: Case) -> tuple[Op, Op, list[Tensor]]:
    from mmrec.model.ops import kernels as own

    plain = without_state(lambda x, weight: reference.rms_norm(x, weight, 1e-6))
    inputs = [torch.randn(2, case.length, 6).to(case.dtype), torch.randn(6)]
    return plain, without_state(lambda x, weight: own.rms_norm(x, weight, 1e-6, case.dtype)), inputs


def swiglu_linear(case: Case) -> tuple[Op, Op, list[Tensor]]:
    from mmrec.model.ops import kernels as own

    plain = without_state(lambda x, weight: F.linear(reference.swiglu(x), weight))
    inputs = [torch.randn(2, case.length, 12).to(case.dtype), torch.randn(5, 6)]
    return plain, without_state(lambda x, weight: own.swiglu_linear(x, weight, case.dtype)), inputs


def gated_linear(case: Case) -> tuple[Op, Op, list[Tensor]]:
    from mmrec.model.ops import kernels as own

    plain = without_state(lambda h, gate, weight: F.linear(h * gate[..., 6:12].sigmoid(), weight))
    inputs = [torch.randn(2, case.length, 6), torch.randn(2, case.length, 24).to(case.dtype), torch.randn(5, 6)]
    return plain, without_state(lambda h, g, weight: own.gated_linear(h, g[..., 6:12], weight, case.dtype)), inputs


def normed_linear(case: Case) -> tuple[Op, Op, list[Tensor]]:
    from mmrec.model.ops import kernels as own

    def plain(o: Tensor, norm: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        opened = F.silu(gate) if case.negative else gate.sigmoid()
        return F.linear(reference.rms_norm(o, norm, 1e-6).flatten(2) * opened, weight)

    def kernels(o: Tensor, norm: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return own.normed_linear(o, (norm, 1e-6), gate, case.negative, weight, case.dtype)

    o, gate = torch.randn(2, case.length, 3, 6), torch.randn(2, case.length, 18)
    inputs = [o.to(case.dtype), torch.randn(6), gate.to(case.dtype), torch.randn(5, 18)]
    return without_state(plain), without_state(kernels), inputs


def delta_gates(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Of a part of a layer's projection; without a bias of the writing strength where there are no resets."""
    from mmrec.model.ops import kernels as own

    reset, greatest = some_resets(case, 2), 2.0 if case.negative else 1.0

    def given(x: Tensor, log_rate: Tensor, bias: Tensor) -> reference.DeltaGates:
        return reference.DeltaGates(x[..., 2:5], x[..., 5:8], log_rate, bias[0], bias[1] if case.resets else None)

    def plain(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, beta = reference.delta_gates(given(*inputs), torch.float64)
        return reference.apply_reset(log_decay, reset), greatest * beta

    def kernels(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return own.delta_gates(given(*inputs), greatest, reset)

    inputs = [5 * torch.randn(2, case.length, 9), torch.randn(3), torch.randn(2, 3)]
    return plain, kernels, [inputs[0].to(case.dtype), *inputs[1:]]


def conv_gated_delta_rule(case: Case) -> tuple[Op, Op, list[Tensor]]:
    """Of the whole projection of a layer; the final state is that of the convolution, too."""
    from mmrec.model.ops import fla_delta_rule

    teach_loops()
    heads, size, reset = 2, 16, some_resets(case, 1)
    width = 3 * heads * size

    def plain(x: Tensor, decay: Tensor, beta: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Any:
        qkv, after = plain_conv(x[..., :width], past, weight, reset)
        q, k, v = reference.split_heads(qkv, heads)
        q, k = reference.l2_normalize(q) / 2, reference.l2_normalize(k)
        o, state = reference.gated_delta_rule(q, k, v, decay.mT, beta.mT, state)
        return o.transpose(1, 2), torch.cat([state.flatten(), after.flatten()])

    def kernels(x: Tensor, decay: Tensor, beta: Tensor, state: Tensor, past: Tensor, weight: Tensor) -> Any:
        conv, gates = (past, weight), (decay, beta)
        o, state, after = fla_delta_rule.conv_gated_delta_rule(
            x[..., :width], conv, gates, state, 0.5, reset, products=case.dtype
        )
        return o, torch.cat([state.flatten(), after.flatten()])

    decay, beta = -torch.rand(1, case.length, heads), torch.rand(1, case.length, heads) * (1 + case.negative)
    gates = [reference.apply_reset(decay, reset), beta]
    conv = [torch.randn(1, 3, width).to(case.dtype).float(), torch.randn(width, 4)]
    x = torch.randn(1, case.length, width + 5).to(case.dtype)
    return plain, kernels, [x, *gates, torch.randn(1, heads, size, size), *conv]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


def run(case: Case) -> dict[str, float]:
    """Return how far outputs, state and gradients are from those of the reference."""
    torch.manual_seed(0)
    if case.op != "conv_gated_delta_rule":
        small_parts()
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
