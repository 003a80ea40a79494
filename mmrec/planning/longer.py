"""A training that is made longer: what is expected of it, and what it needs against overfitting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY
from mmrec.data.store import TokenFolder
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.law import LAW, Law
from mmrec.planning.plan import as_arguments, regularization
from mmrec.planning.record import seconds_trained

SPREAD = 0.023
"""What the logarithm of the outcome is not off by in two of three pairs of trainings of docs/planning-study.md."""
FEWEST_TOKENS = 200_000
"""That were read before; of shorter trainings the law knows too little."""


@dataclass(frozen=True)
class Longer:
    """A training that goes on after its end.

    Attributes:
        config: of the model.
        tokens: that were read before the best checkpoint.
        tokens_in_all: that will have been read at the end.
        text_tokens: of the training text.
        vocab_size: of its tokenizer.
    """

    config: ModelConfig
    tokens: float
    tokens_in_all: float
    text_tokens: int
    vocab_size: int

    @staticmethod
    def of(best: Path, seconds: float, most_steps: int | None, copies: int, folder: TokenFolder) -> Longer | None:
        """Return a training that was shorter until now; None where its pace is not known.

        Args:
            best: its best checkpoint.
            seconds: of training in all, at the pace before.
            most_steps: updates in all that are a limit beside the time; None for none.
            copies: processes that have rows of their own.
            folder: what it is trained on.
        """
        checkpoint = read_checkpoint(find_intact_checkpoint(best, says=False), mmap=True, verify=False)
        data, steps, before = checkpoint["TextDataModule"], int(checkpoint["global_step"]), seconds_trained(best)
        if not before or not steps:
            return None
        config = ModelConfig.from_dict(checkpoint[MODEL_KEY]["shape"])
        tokens = float(copies * data["batch_size"] * data["seq_len"] * steps)
        times = min(seconds / before, math.inf if most_steps is None else most_steps / steps)
        return Longer(config, tokens, times * tokens, len(folder.train), folder.tokenizer.vocab_size)

    def expected(self, came: float, law: Law = LAW) -> float | None:
        """Return the bits per byte that it is expected to reach; None where too little was read before.

        The law says what more tokens take from what came so far: what it is off by on a text is nearly the same
        however many tokens of it are read. No more are expected than came: the best model is kept.

        Args:
            came: bits per byte of the best checkpoint.
            law: how the loss falls by the tokens.
        """
        if self.tokens < FEWEST_TOKENS:
            return None
        parameters = layer_parameters(self.config)
        loss, longer = (
            law.relative_loss(parameters, self.text_tokens, each) for each in (self.tokens, self.tokens_in_all)
        )
        return came * min(1.0, longer / loss)

    def options(self, before: list[str]) -> list[str]:
        """Return the options ``before`` with what is done against overfitting where a text is read so often."""
        changed = regularization(self.config, self.tokens_in_all, self.text_tokens, self.vocab_size)
        ours = as_arguments({f"model.{name}": value for name, value in changed.items()})
        names = tuple(f"{option.partition('=')[0]}=" for option in ours)
        return [*(option for option in before if not option.startswith(names)), *ours]


def describe(came: float, expected: float | None) -> str:
    """Return what is said of a longer training, after ``came`` bits per byte so far."""
    if expected is None:
        return ""
    if expected == came:
        return f"; no better model than that of {came:.2f} bits/byte is expected"
    low, high = (expected * math.exp(part * SPREAD) for part in (-1, 1))
    return f"; {expected:.2f} bits/byte are expected ({low:.2f} to {high:.2f} two times of three), {came:.2f} before"
