"""Metrics of a text: the negative log-likelihood of its tokens, and what is derived from sums of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec.core.devices import has_float64
from mmrec.data.batches import IGNORE_INDEX


def token_nll(logits: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """Negative log-likelihood of each target, in nats; 0 for those that are not scored.

    Args:
        logits: [..., N]; computed with in float32 where they are in half of it.
        targets: [...], int64: a token, or :data:`mmrec.data.batches.IGNORE_INDEX`.
        reduction: "none" for one number a target, [M] with the leading dimensions flattened; "sum", or "mean" over
            the targets that are scored, for a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


class TextMetrics:
    """Loss, perplexity and bits per byte of a text; in any number of updates the figures are the same.

    Sums are float64, so that a text of 10^9 tokens loses nothing, and on the CPU where a device has none.
    The figures are of the scored tokens alone, and of those that this process is given: where several score a text,
    each is given all of it.

    Attributes:
        nll: sum of the negative log-likelihoods in nats, a scalar, as the others are.
        tokens: how many were scored.
        bytes: that they stand for.
        characters: that they stand for.
    """

    def __init__(self) -> None:
        self.nll, self.tokens, self.bytes, self.characters = torch.zeros(4, dtype=torch.float64).unbind()

    def update(self, nll: Tensor, lengths: Tensor) -> None:
        """Add some scored tokens.

        Args:
            nll: [M], the negative log-likelihood of each token, in nats.
            lengths: [M, 2], the bytes and the characters that each token stands for; on the same device.
        """
        if not has_float64(nll.device):
            nll, lengths = nll.cpu(), lengths.cpu()
        self.nll = self.nll.to(nll.device) + nll.sum(dtype=torch.float64)
        self.tokens = self.tokens + len(nll)
        self.bytes = self.bytes.to(nll.device) + lengths[:, 0].sum()
        self.characters = self.characters.to(nll.device) + lengths[:, 1].sum()

    def compute(self) -> dict[str, Tensor]:
        """Return loss (nats/token), perplexity (per token), bits_per_byte and nats_per_char."""
        loss = self.nll / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": self.nll / (math.log(2) * self.bytes),
            "nats_per_char": self.nll / self.characters,
        }


class MetricsByPosition:
    """The metrics of a text in bands of position: the first 1,024 tokens, then those to 2,047, to 4,095, and so on.

    A model that uses its state gets better from band to band, or at least not worse.
    """

    FIRST = 1024

    def __init__(self) -> None:
        self._bands: list[TextMetrics] = []

    def update(self, nll: Tensor, lengths: Tensor, position: int) -> None:
        """Add scored tokens that follow each other.

        Args:
            nll: [M], the negative log-likelihood of each token, in nats.
            lengths: [M, 2], the bytes and the characters that each token stands for.
            position: of the first of them in the text, from 0.
        """
        done = 0
        while done < len(nll):
            number = max(0, (position + done) // self.FIRST).bit_length()
            part = slice(done, (self.FIRST << number) - position)
            while len(self._bands) <= number:
                self._bands.append(TextMetrics())
            self._bands[number].update(nll[part], lengths[part])
            done = part.stop

    def compute(self) -> dict[int, TextMetrics]:
        """Return the metrics of each band with tokens in it, by the position that the band begins at."""
        starts = [0, *(self.FIRST << number for number in range(len(self._bands)))]
        return {start: band for start, band in zip(starts, self._bands, strict=False) if band.tokens}
