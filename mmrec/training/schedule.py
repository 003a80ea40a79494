"""How many updates a run is planned to have, and the learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from mmrec.training.compat import updates_to_come
from mmrec.training.options import OptimizerOptions


@dataclass
class PlannedSteps:
    """The number of updates at which a run is planned to end: what its options say, or there is less time for.

    Attributes:
        by_options: those of the options; None where they have no end.
        in_time: those of a limit of time; None where there is none, or nobody knows yet.
        decay_in_time: the update with which the schedule "wsd" begins to lower the learning rate of the latter.
    """

    by_options: int | None = None
    in_time: int | None = None
    decay_in_time: float | None = None

    @property
    def steps(self) -> int | None:
        """Updates in all; None where nothing says so."""
        return min((steps for steps in (self.by_options, self.in_time) if steps is not None), default=None)

    def decay_start(self, options: OptimizerOptions) -> float | None:
        """Return the update (from 0) with which "wsd" begins to lower the rate; None where no end is planned."""
        if self.steps is None:
            return None
        in_time = self.decay_in_time if self.steps == self.in_time else None
        return decay_start(options, self.steps) if in_time is None else in_time


def steps_of_options(trainer: Trainer) -> int | None:
    """Return the number of updates at which the run's options end it; None where nothing but time does.

    Those made, and those to come by the place in the text: so the schedule ends with the run also where batches,
    sequences, processes or the text are others than before it was resumed.

    Not ``trainer.estimated_stepping_batches``: asking for it before training sets the loaders up too early, and the
    place in the data is then lost on resuming (Lightning issue 20550).
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches: int = trainer.datamodule.batches_per_epoch()  # type: ignore[attr-defined]
        limits.append(trainer.global_step + updates_to_come(trainer, batches))
    return min(limits, default=None)


def learning_rate_share(
    step: int, options: OptimizerOptions, total_steps: int | None, first: float | None = None
) -> float:
    """Return the learning rate of update ``step`` (from 0), as a share of the peak.

    Linear from ``1 / warmup_steps`` to 1, then down to ``min_lr_ratio`` at ``total_steps``: by half a cosine, or,
    with the schedule "wsd", not before the last ``decay_ratio`` of the updates, by one minus the square root of what
    is done of them (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations").
    Where ``total_steps`` is None, because nobody knows when training ends, it stays at 1. With "wsd", ``first`` is
    the update with which it begins to fall, where that is another than the last ``decay_ratio`` begins with.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if total_steps is None:
        return 1.0
    if options.schedule == "wsd":
        first = decay_start(options, total_steps) if first is None else first
        fall = 1 - math.sqrt(_share(step, first, total_steps))
    else:
        fall = 0.5 * (1 + math.cos(math.pi * _share(step, options.warmup_steps, total_steps)))
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * fall


def decay_start(options: OptimizerOptions, total_steps: int) -> int:
    """Return the update (from 0) with which the schedule "wsd" begins to lower the learning rate."""
    return max(options.warmup_steps, total_steps - round(options.decay_ratio * total_steps))


def decay_start_of_other_plan(
    step: int, options: OptimizerOptions, first: float, planned: int, total_steps: int
) -> float:
    """Return the update with which "wsd" begins to lower the rate where another plan is made on the way.

    The rate goes on from where it is: what is done of its fall is done of the new one, too. Where it has fallen to
    its end, the training begins anew with its peak.

    Args:
        step: updates that are made.
        options: of the schedule.
        first: the update with which the rate began to fall, or would have, in the plan before.
        planned: updates of the plan before.
        total_steps: updates that are planned now.
    """
    done = _share(step, first, planned)
    if done in (0, 1):
        return max(step, decay_start(options, total_steps))
    return (step - done * total_steps) / (1 - done)


def _share(step: int, first: float, last: int) -> float:
    """Return how much of the way from ``first`` to ``last`` is done at ``step``, between 0 and 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
