"""How well a text was predicted, summed exactly over all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TextScore(Metric):
    """Loss, perplexity and bits per byte of a text; in any number of updates the figures are the same.

    Sums are float64, so that a text of 10^9 tokens loses nothing. The figures are of the scored tokens alone.
    """

    full_state_update = False
    higher_is_better = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    characters: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes", "characters"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, lengths: Tensor) -> None:
        """Add some scored tokens.

        Args:
            nats: [M], minus the natural logarithm of the probability that each token was given.
            lengths: [M, 2], the bytes and the characters that each token stands for.
        """
        self.nats += nats.sum(dtype=torch.float64)
        self.tokens += len(nats)
        self.bytes += lengths[:, 0].sum()
        self.characters += lengths[:, 1].sum()

    def compute(self) -> dict[str, Tensor]:
        """Return loss (nats/token), perplexity (per token), bits_per_byte and nats_per_char."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": self.nats / (math.log(2) * self.bytes),
            "nats_per_char": self.nats / self.characters,
        }
