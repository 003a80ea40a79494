"""What the loss half-way through a planned training says of its end: more than the law knew before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmrec.planning.law import likely_range
from mmrec.planning.plan import has_words
from mmrec.planning.record import Record
from mmrec.training.callbacks.half_way import LATEST, HalfWayScore
from mmrec.training.options import OptimizerOptions

END_OVER_HALF, SPREAD = 0.87, 0.035
"""Bits per byte of the best checkpoint on the whole validation text over those of the validation half-way, and what
its logarithm is not off by in two of three trainings of docs/planning-study.md."""
MOST_EPOCHS, MOST_EPOCHS_OF_WORDS, FEWEST_UPDATES = 8, 5, 200
"""Trainings that read their text more often gain less in their second half, and those by words and parts of words
sooner; shorter ones were not looked at."""


def is_known(score: HalfWayScore) -> bool:
    """Whether trainings like this one were looked at: its schedule, its epochs, and a validation near the half."""
    like = OptimizerOptions()
    most_epochs = MOST_EPOCHS_OF_WORDS if has_words(score.vocab_size) else MOST_EPOCHS
    return (
        score.options.schedule == "wsd"
        and score.options.decay_ratio == like.decay_ratio
        and score.options.min_lr_ratio == like.min_lr_ratio
        and score.epochs < most_epochs
        and score.planned_steps >= FEWEST_UPDATES
        and score.step <= LATEST * score.planned_steps
    )


class HalfWayLine:
    """Says what is expected from now on, and writes it into the run's record.

    Args:
        record: of the run.
        run: its folder.

    Attributes:
        record: with what is expected half-way, once that is known.
    """

    def __init__(self, record: Record, run: Path) -> None:
        self.record, self._run = record, run

    def __call__(self, score: HalfWayScore) -> str | None:
        """Return the line; None where nothing is known of trainings like this one."""
        if not is_known(score):
            return None
        expected = score.bits_per_byte * END_OVER_HALF
        self.record = replace(self.record, half_way=expected)
        self.record.write(self._run)
        return f"half-way    {expected:.2f} bits/byte are expected now {likely_range(expected, SPREAD)}"
