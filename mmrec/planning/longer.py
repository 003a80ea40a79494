"""A training that is made longer: what is expected of it, and what it needs against overfitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmrec.checkpoints.contents import MODEL_KEY
from mmrec.data.store import TokenFolder
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.comparison import MOST_SCORED
from mmrec.planning.law import LAW, likely_range
from mmrec.planning.options import in_place
from mmrec.planning.plan import FORWARD_SHARE, as_arguments, regularization
from mmrec.planning.record import seconds_of

SPREAD = 0.023
"""What the logarithm of the outcome is not off by in two of three pairs of trainings of docs/planning-study.md."""
FEWEST_TOKENS = 200_000
"""That were read before; of shorter trainings the law knows too little."""


@dataclass(frozen=True)
class Earlier:
    """A training that was ended or stopped, and goes on.

    Attributes:
        config: of the model.
        steps: updates that were made before the checkpoint.
        tokens: that were read before it.
        seconds: of training before it, with its validations.
        folder: what it is trained on.
    """

    config: ModelConfig
    steps: int
    tokens: int
    seconds: float
    folder: TokenFolder

    @staticmethod
    def of(checkpoint: dict[str, Any], copies: int, folder: TokenFolder) -> Earlier | None:
        """Return what ``checkpoint`` says of it; None where its pace is not known.

        Args:
            checkpoint: what was read of the one at its end.
            copies: processes that have rows of their own.
            folder: what it is trained on.
        """
        data, steps, seconds = checkpoint["TextDataModule"], int(checkpoint["global_step"]), seconds_of(checkpoint)
        if not seconds or not steps:
            return None
        config = ModelConfig.from_dict(checkpoint[MODEL_KEY]["shape"])
        return Earlier(config, steps, copies * data["batch_size"] * data["seq_len"] * steps, seconds, folder)

    def tokens_in(self, seconds: float, most_steps: int | None) -> float:
        """Return the tokens that are read in all.

        Args:
            seconds: of training in all, at the pace before.
            most_steps: updates in all that are a limit beside the time; None for none.
        """
        times = min(seconds / self.seconds, math.inf if most_steps is None else most_steps / self.steps)
        return times * self.tokens

    def scoring_seconds(self, processes: int) -> float:
        """Return about what the score at the end takes one process, where so many have trained."""
        tokens = min(len(self.folder.val), MOST_SCORED)
        return tokens * FORWARD_SHARE * processes * self.seconds / self.tokens

    def expected(self, came: float, tokens: float) -> float | None:
        """Return the bits per byte that are expected of so many tokens in all; None where too few were read before.

        The law says what more tokens take from what came so far: what it is off by on a text is nearly the same
        however many tokens of it are read. No more are expected than came: the best model is kept.

        Args:
            came: bits per byte of the checkpoint.
            tokens: in all.
        """
        return None if self.tokens < FEWEST_TOKENS else min(came, self.moved(came, self.tokens, tokens))

    def moved(self, loss: float, before: float, now: float) -> float:
        """Return what becomes of the ``loss`` of a training of ``before`` tokens in all where it reads ``now``."""
        parameters, text = layer_parameters(self.config), len(self.folder.train)
        was, becomes = (LAW.relative_loss(parameters, text, tokens) for tokens in (before, now))
        return loss * becomes / was

    def options(self, before: Sequence[str], tokens: float) -> list[str]:
        """Return ``before`` with what is done against overfitting where so many tokens are read in all."""
        vocab_size = self.folder.tokenizer.vocab_size
        changed = regularization(self.config, tokens, len(self.folder.train), vocab_size)
        return in_place(before, as_arguments({f"model.{name}": value for name, value in changed.items()}))


def describe(came: float, expected: float | None) -> str:
    """Return what is said of a longer training, after ``came`` bits per byte so far."""
    if expected is None:
        return ""
    if expected == came:
        return f"; no better model than that of {came:.2f} bits/byte is expected"
    return f"; {expected:.2f} bits/byte are expected {likely_range(expected, SPREAD)}, {came:.2f} before"
