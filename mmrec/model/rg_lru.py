"""The "short" recurrent layer: Griffin's RG-LRU, a number a channel that fades at an input-dependent rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model.layers import CausalConv
from mmrec.model.ops import dispatch
from mmrec.model.recurrent_layer import Gates, RecurrentLayer
from mmrec.model.state import LayerState


class RGLRUProjection(NamedTuple):
    """The parts of what :attr:`RGLRU.project` returns, each [..., D], before their biases and non-linearities."""

    values: Tensor
    recurrence_gate: Tensor
    input_gate: Tensor
    output_gate: Tensor


class RGLRU(RecurrentLayer):
    """Gated linear recurrence: D numbers that fade at learned, input-dependent rates.

    After the real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4):
    :func:`mmrec.model.ops.reference.rg_lru` with the rate :meth:`decay_rate`. Where it differs: both gates are read
    from the layer's input, before the convolution, by full matrices (Griffin: after it, by block-diagonal ones); the
    first input after a reset is scaled by ``sqrt(1 - a^2)`` as any other (Griffin's code: by 1); the output gate is a
    sigmoid (Griffin: GeLU). docs/model.md has the equations.

    Args:
        dim: D.
        conv_width: tokens that the convolution sees, C.
    """

    DECAY_SCALE = 8.0

    def __init__(self, dim: int, conv_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, len(RGLRUProjection._fields) * dim, bias=False)
        self.conv = CausalConv(dim, conv_width)
        self.r_bias = nn.Parameter(torch.zeros(dim))
        self.i_bias = nn.Parameter(torch.zeros(dim))
        # Half-lives log-uniform in 1..256 tokens where the recurrence gate is one half.
        half_life = torch.exp(torch.linspace(0, math.log(256), dim))
        rate = math.log(2) / half_life / (self.DECAY_SCALE / 2)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))
        self.output = nn.Linear(dim, dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        past = self.conv.zero_state(rows, device, dtype)
        return past, torch.zeros(rows, past.shape[-1], device=device, dtype=dtype)

    def split(self, projected: Tensor) -> RGLRUProjection:
        """Return the parts of ``projected`` [..., 4 D], the output of ``project``, as views."""
        return RGLRUProjection(*projected.chunk(len(RGLRUProjection._fields), dim=-1))

    def decay_rate(self) -> Tensor:
        """Return the decay where the recurrence gate is fully open, [D], in nats a token, not negative."""
        return self.DECAY_SCALE * F.softplus(self.rate)

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        projected, rate, biases = self.project(x), self.decay_rate(), (self.r_bias, self.i_bias)
        kernels = dispatch.native(projected)
        if kernels is not None and state[1].dtype == rate.dtype == torch.float32:
            y, past, memory = kernels.short_memory(projected, *state, self.conv.weight, biases, rate, reset_mask)
            return self.output(y), (past, memory)
        parts, conv = self.split(projected), (state[0], self.conv.weight)
        gates = parts.recurrence_gate, parts.input_gate
        h, memory, past = dispatch.conv_rg_lru(gates, biases, parts.values, conv, rate, state[1], reset_mask)
        return dispatch.gated_linear(h, parts.output_gate, self.output, x.dtype), (past, memory)

    def gates(self, x: Tensor) -> Gates:
        parts = self.split(self.project(x))
        r = (parts.recurrence_gate.float() + self.r_bias).sigmoid()
        i = (parts.input_gate.float() + self.i_bias).sigmoid()
        activations = {"recurrence": r, "input": i, "output": parts.output_gate.float().sigmoid()}
        return Gates(-self.decay_rate() * r, activations)
