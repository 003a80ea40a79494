"""The "portable" recurrent layer: Gated DeltaNet in the form that llama.cpp computes for Qwen3.5."""

from __future__ import annotations

from torch import nn

from mmrec.model.gated_deltanet import GatedDeltaNet


class PortableGatedDeltaNet(GatedDeltaNet):
    """Gated delta rule with the published gates, for models that are handed on as GGUF.

    As :class:`~mmrec.model.GatedDeltaNet`, except that the output gate is SiLU of a full map, [D, D], a part of
    ``project``; the writing strength has no bias; and queries are scaled by ``1 / sqrt(K)``, which the norm that
    follows takes out again, but for its epsilon. The arguments are the same.
    """

    SILU_GATE = True

    def __init__(self, dim: int, heads: int, conv_width: int, negative_eigenvalues: bool = False) -> None:
        super().__init__(dim, heads, conv_width, negative_eigenvalues)
        self.gate = self.beta_bias = None
        self.query_scale = (dim // heads) ** -0.5
        self.sizes = [3 * dim, heads, heads, dim]
        self.project = nn.Linear(dim, sum(self.sizes), bias=False)
