"""Sampling: the options of a draw, and the draw of the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrec.checkpoints.cached import ORDERS
from mmrec.core.errors import UserError

GREEDY_BELOW = 1e-6
"""A temperature below it leaves no chance to any but the most likely token, and divides by what may round to 0."""


@dataclass(frozen=True)
class SamplingOptions:
    """How many tokens are generated, and how each is drawn.

    Args:
        length: number of tokens to generate.
        temperature: 0 always takes the most likely token (below 1e-6 too); 1 draws from the model's own distribution.
        top_k: draw among so many most likely tokens; 0 means all.
        top_p: draw among the most likely tokens that together reach this probability, at least one (nucleus sampling,
            Holtzman et al. 2020).
        seed: another seed gives another text.
        verbatim: let the cache of n-grams of a memory take part, with at most so many tokens in a row as they were
            read; 0 leaves it out.

    Raises:
        UserError: a value is out of its range.
    """

    length: int = 500
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    verbatim: int = 0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("length", self.length >= 0, "it must be at least 0"),
            ("temperature", 0 <= self.temperature < math.inf, "it must be at least 0, and finite"),
            ("top_k", self.top_k >= 0, "it must be at least 0"),
            ("top_p", 0 < self.top_p <= 1, "it must lie above 0 and be at most 1"),
            ("seed", -(2**63) <= self.seed < 2**64, "it must be a whole number of 64 bits"),
            ("verbatim", self.verbatim == 0 or self.verbatim >= ORDERS[0], f"it must be 0, or at least {ORDERS[0]}"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}; {rule}")


class Sampler:
    """Draws the tokens of one text, on the CPU: the same seed draws the same from the same logits.

    Args:
        options: of the draws.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options, self._random = options, torch.Generator().manual_seed(options.seed)

    def draw(self, logits: Tensor) -> int:
        """Return the next token, drawn by its ``logits`` [N], on the CPU."""
        return int(sample_token(logits[None], self._options, self._random))


def sample_token(logits: Tensor, options: SamplingOptions, random: torch.Generator) -> Tensor:
    """Draw the next token of each row.

    Args:
        logits: [B, N].
        options: temperature, top_k and top_p of the draw.
        random: source of the draw; ``options.seed`` is not read here.

    Returns:
        [B], int64.
    """
    if options.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits.float() / options.temperature
    if options.top_k:
        least = logits.topk(min(options.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= options.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=random).squeeze(-1)
