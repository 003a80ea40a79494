"""The "portable" recurrent layer: Gated DeltaNet in the form that llama.cpp computes for Qwen3.5."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model.gated_deltanet import GatedDeltaNet, GatedDeltaNetProjection
from mmrec.model.recurrent_layer import Gates


class PortableGatedDeltaNet(GatedDeltaNet):
    """Gated delta rule with the published gates, for models that are handed on as GGUF.

    As :class:`~mmrec.model.GatedDeltaNet`, except that the output gate is SiLU of a full map, [D, D], a part of
    ``project``; the writing strength has no bias; and queries are scaled by ``1 / sqrt(K)``, which the norm that
    follows takes out again, but for its epsilon. The arguments are the same.
    """

    def __init__(self, dim: int, heads: int, conv_width: int, negative_eigenvalues: bool = False) -> None:
        super().__init__(dim, heads, conv_width, negative_eigenvalues)
        del self.gate, self.beta_bias
        self.query_scale = (dim // heads) ** -0.5
        self.sizes = [3 * dim, heads, heads, dim]
        self.project = nn.Linear(dim, sum(self.sizes), bias=False)

    def gates(self, x: Tensor) -> Gates:
        found = super().gates(x)
        opening = self.split(self.project(x)).output_gate.float().sigmoid()  # SiLU itself is not bounded
        return Gates(found.log_decay, found.activations | {"output": opening})

    def _write_gate(self, parts: GatedDeltaNetProjection, dtype: torch.dtype) -> Tensor:
        return parts.beta.to(dtype).sigmoid()

    def _raw_output_gate(self, parts: GatedDeltaNetProjection) -> Tensor:
        return parts.output_gate

    def _output_gate(self, parts: GatedDeltaNetProjection) -> Tensor:
        return F.silu(parts.output_gate)

    def _weights(self) -> tuple[Tensor, ...]:
        no_bias = torch.zeros_like(self.decay_bias)
        return self.conv.weight, self.log_rate.exp(), self.decay_bias, no_bias, self.norm.weight

    def _form(self) -> tuple[float, float, float, bool]:
        return (*super()._form()[:3], True)
