"""The "long" recurrent layer: Gated DeltaNet, a matrix a head that is told what to hold for a key."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec.model.layers import CausalConv, RMSNorm
from mmrec.model.ops import dispatch
from mmrec.model.ops.reference import DeltaGates, delta_gates, l2_normalize, split_heads
from mmrec.model.recurrent_layer import Gates, RecurrentLayer
from mmrec.model.state import LayerState


class GatedDeltaNetProjection(NamedTuple):
    """The parts of what :attr:`GatedDeltaNet.project` returns, before their biases and non-linearities."""

    qkv: Tensor
    """[..., 3 D]: queries, keys and values, each of H heads."""
    decay: Tensor
    """[..., H]"""
    beta: Tensor
    """[..., H], the writing strength."""
    output_gate: Tensor
    """[..., :attr:`GatedDeltaNet.GATE_RANK`]: a second map, ``gate``, makes D channels of it."""


class GatedDeltaNet(RecurrentLayer):
    """Gated delta rule: per head a matrix [K, V] that is told what to hold for a key, and corrects itself.

    After Gated Delta Networks (Yang, Kautz, Hatamizadeh 2024), :func:`mmrec.model.ops.reference.gated_delta_rule`;
    half-lives start log-uniform in 8..8192 tokens. Where it differs: the output gate is a sigmoid of a map of low
    rank (there: SiLU of a full one); queries are not scaled by ``1 / sqrt(K)``, which the norm that follows would
    take out again; values are as wide as keys (there: twice). docs/model.md has the equations.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H.
        conv_width: tokens that the convolution sees, C.
        negative_eigenvalues: let the writing strength beta be in 0..2 instead of 0..1 (Grazzi et al. 2024).
    """

    GATE_RANK = 16
    SILU_GATE = False
    """The output gate is a SiLU, not a sigmoid."""
    beta_bias: nn.Parameter | None
    gate: nn.Linear | None

    def __init__(self, dim: int, heads: int, conv_width: int, negative_eigenvalues: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query_scale: float | None = None
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        self.sizes = [3 * dim, heads, heads, self.GATE_RANK]  # of the parts of GatedDeltaNetProjection
        self.project = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = CausalConv(3 * dim, conv_width)
        half_life = torch.exp(torch.linspace(math.log(8), math.log(8192), heads))
        self.log_rate = nn.Parameter(torch.log(math.log(2) / half_life))
        self.decay_bias = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus of it is 1
        self.beta_bias = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Linear(self.GATE_RANK, dim, bias=False)
        self.norm = RMSNorm(dim // heads)
        self.output = nn.Linear(dim, dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        past = self.conv.zero_state(rows, device, dtype)
        size = past.shape[-1] // 3 // self.heads
        return past, torch.zeros(rows, self.heads, size, size, device=device, dtype=dtype)

    def split(self, projected: Tensor) -> GatedDeltaNetProjection:
        """Return the parts of ``projected`` [..., any], the output of ``project``, as views."""
        return GatedDeltaNetProjection(*projected.split(self.sizes, dim=-1))

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        projected = self.project(x)
        parts = self.split(projected)
        gate, kernels = self._output_logits(parts), dispatch.native(projected)
        if kernels is not None and state[1].dtype == self.log_rate.dtype == torch.float32:
            y, past, memory = kernels.long_memory(projected, gate, *state, self._weights(), self._form(), reset_mask)
            return self.output(y), (past, memory)
        gates = dispatch.delta_gates(self._gate_inputs(parts), self.beta_max, state[1].dtype, reset_mask)
        conv = (state[0], self.conv.weight)
        o, memory, past = dispatch.conv_gated_delta_rule(
            parts.qkv, conv, gates, state[1], self.query_scale, reset_mask
        )
        norm = (self.norm.weight, self.norm.EPSILON)
        return dispatch.normed_linear(o, norm, gate, self.SILU_GATE, self.output, x.dtype), (past, memory)

    def heads_of(self, qkv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, in ``dtype``, and values, [B, H, T, K] each, of the convolution's ``qkv``."""
        q, k, v = split_heads(qkv, self.heads)
        q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
        return (q if self.query_scale is None else q * self.query_scale), k, v

    def gates(self, x: Tensor) -> Gates:
        parts = self.split(self.project(x))
        log_decay, write = delta_gates(self._gate_inputs(parts), torch.float32)
        # Of a SiLU, too: the SiLU itself is not bounded.
        return Gates(log_decay, {"write": write, "output": self._output_logits(parts).sigmoid().float()})

    def _gate_inputs(self, parts: GatedDeltaNetProjection) -> DeltaGates:
        return DeltaGates(parts.decay, parts.beta, self.log_rate, self.decay_bias, self.beta_bias)

    def _output_logits(self, parts: GatedDeltaNetProjection) -> Tensor:
        """Return what the output gate opens by, [B, T, D]."""
        found: Tensor = parts.output_gate if self.gate is None else self.gate(parts.output_gate)
        return found

    def _weights(self) -> tuple[Tensor, ...]:
        """Return the weights of the convolution, the decay of an open gate in nats, the biases, and the norm's."""
        beta_bias = torch.zeros_like(self.decay_bias) if self.beta_bias is None else self.beta_bias
        return self.conv.weight, self.log_rate.exp(), self.decay_bias, beta_bias, self.norm.weight

    def _form(self) -> tuple[float, float, float, bool]:
        """Return the maximum of beta, the scale of queries, the norm's epsilon; whether the output gate is SiLU."""
        return self.beta_max, self.query_scale or 1.0, self.norm.EPSILON, self.SILU_GATE
