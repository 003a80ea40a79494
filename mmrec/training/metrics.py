"""The figures of a validation as a metric of torchmetrics, as Lightning's modules have them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from mmrec.inference.metrics import text_figures


class TextScore(Metric):
    """Loss, perplexity and bits per byte of a text; in any number of updates the figures are the same.

    :class:`mmrec.inference.metrics.TextMetrics` has the same sums, for programs that train nothing and do without
    torchmetrics. Every process reads the whole text, so nothing is added up over them.
    """

    full_state_update = False
    higher_is_better = False
    nll: Tensor
    tokens: Tensor
    bytes: Tensor
    characters: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("nll", "tokens", "bytes", "characters"):
            self.add_state(name, torch.zeros((), dtype=torch.float64))

    def update(self, nll: Tensor, lengths: Tensor) -> None:
        """Add some scored tokens.

        Args:
            nll: [M], the negative log-likelihood of each token, in nats.
            lengths: [M, 2], the bytes and the characters that each token stands for.
        """
        self.nll += nll.sum(dtype=torch.float64)
        self.tokens += len(nll)
        self.bytes += lengths[:, 0].sum()
        self.characters += lengths[:, 1].sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of :func:`mmrec.inference.metrics.text_figures`."""
        return text_figures(self.nll, self.tokens, self.bytes, self.characters)
