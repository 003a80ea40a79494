"""What a model of some size is expected to reach on a text, by the tokens that it reads: the law behind a plan.

The form is that of Muennighoff et al. 2023 ("Scaling Data-Constrained Language Models"): a loss that falls by powers
of the parameters and of the tokens, where tokens that are read again count for less. The coefficients are fitted to
docs/planning.csv by scripts/planning_law.py, which says how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_COUNTED = 1_000_000
"""Tokens of a training text that the n-gram model is counted in, and first ones of the validation text that it is
tried on, in about three seconds."""
MOST_TOLD_BY_LENGTH = 2_000_000
"""Tokens of a training text beyond which its length says no more of how n-grams of a part of it do beside a model."""
MOST_APART = 1.5
"""Of what xz and an n-gram model make of a text, the one over the other."""


@dataclass(frozen=True)
class Law:
    """Loss, relative to what an n-gram model and xz make of the text, by parameters and tokens.

    The bits per byte of a model are ``text * (floor + parameters_weight / P**parameters_power + tokens_weight /
    D**tokens_power + overfit * ln(1 + P / U) * ln(epochs))``, with P the parameters, D the effective tokens and U the
    tokens of the training text, in millions, and ``text`` the bits per byte that an n-gram model of the training text
    makes of the validation text, times a power of what xz makes of it over that, and one of the length of the text:
    what is said again at a length, or far away, is told by xz alone, and of a short text n-grams know less than a
    model that is trained on it. Of a model that counts its tokens they are :meth:`gain_of_counts` times that.

    Attributes:
        floor: of a model without limits.
        parameters_weight: weight of the term of the parameters.
        parameters_power: its power.
        tokens_weight: weight of the term of the tokens.
        tokens_power: its power.
        repetition: epochs after which reading the text again has lost most of its worth, R of the paper.
        overfit: what a parameter too many costs, by the logarithm of parameters over tokens of the text.
        copies: power of what xz makes of the text over what the n-gram model makes.
        length: power of the millions of tokens of the training text, at most :data:`MOST_TOLD_BY_LENGTH`.
        counting: what a model that counts its tokens makes of a text of a million tokens, over what one that does
            not would of the same tokens.
        counting_power: power of the millions of tokens of the text by which that falls: words need a text to be
            learned from.
        spread: what two of three texts that are left out of the fit do not exceed, of the logarithm of what came over
            what was expected.
    """

    floor: float
    parameters_weight: float
    parameters_power: float
    tokens_weight: float
    tokens_power: float
    repetition: float
    overfit: float
    copies: float
    length: float
    counting: float
    counting_power: float
    spread: float

    def yardstick(self, ngram: float, xz: float, text_tokens: float) -> float:
        """Return the bits per byte that the loss of a text is relative to.

        Args:
            ngram: bits per byte by the n-gram model.
            xz: bits per byte by xz; more than :data:`MOST_APART` times as many, or as few, count as that.
            text_tokens: of the training text.
        """
        apart = min(MOST_APART, max(1 / MOST_APART, xz / ngram)) if ngram > 0 else 1.0
        return float(ngram * apart**self.copies * (min(MOST_TOLD_BY_LENGTH, text_tokens) / 1e6) ** self.length)

    def gain_of_counts(self, text_tokens: float) -> float:
        """Return what a model that counts its tokens makes of a text, over what one that does not would.

        Args:
            text_tokens: of the training text.
        """
        return float(self.counting * (text_tokens / 1e6) ** -self.counting_power)

    def effective_tokens(self, text_tokens: float, tokens_read: float) -> float:
        """Return the tokens read, with those that are read again for what they are worth.

        Args:
            text_tokens: of the training text.
            tokens_read: in all epochs.
        """
        again = max(0.0, tokens_read / text_tokens - 1)
        once = min(text_tokens, tokens_read)
        return once + text_tokens * self.repetition * (1 - math.exp(-again / self.repetition))

    def relative_loss(self, parameters: float, text_tokens: float, tokens_read: float) -> float:
        """Return the expected bits per byte over the yardstick of the text.

        Args:
            parameters: of the model, without the embedding.
            text_tokens: of the training text.
            tokens_read: in all epochs.
        """
        million = 1e6
        effective = self.effective_tokens(text_tokens, tokens_read) / million
        epochs = tokens_read / text_tokens
        crowding = math.log1p(parameters / text_tokens) * max(0.0, math.log(max(epochs, 1.0)))
        relative: float = (
            self.floor
            + self.parameters_weight * (parameters / million) ** -self.parameters_power
            + self.tokens_weight * effective**-self.tokens_power
            + self.overfit * crowding
        )
        return relative


LAW = Law(0.6267, 0.0822, 0.433, 0.2047, 0.4995, 10.7884, 0.0157, 0.2912, 0.0787, 0.9464, 0.0168, 0.0453)
"""Fitted to docs/planning.csv by scripts/planning_law.py."""


def likely_range(expected: float, spread: float, most: float = math.inf) -> str:
    """Return, for a person, what two of three outcomes lie between.

    Args:
        expected: bits per byte.
        spread: of the logarithm of what comes over them.
        most: more than that is not said.
    """
    low, high = (min(most, expected * math.exp(part * spread)) for part in (-1, 1))
    return f"({low:.2f} to {high:.2f} two times of three)"
