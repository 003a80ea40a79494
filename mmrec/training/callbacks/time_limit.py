"""A training that is given minutes: how many updates they are enough for, and the schedule that ends with them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmrec.core.errors import UserError
from mmrec.training.callbacks.half_way import BEGIN, LATEST
from mmrec.training.compat import is_accumulating, validate_also
from mmrec.training.module import RecurrentLMModule
from mmrec.training.schedule import decay_start, decay_start_of_other_plan

CHECK_EVERY = 10
"""Updates between two looks at the clock."""
WARM_UP = 3
"""First updates of a process, which are slower than those that follow."""
MOST_MINUTES = 60 * 24 * 3650
TOO_LATE, TOO_EARLY = 0.02, 0.03
"""Shares of the time by which a plan may miss its end before another takes its place."""
UNSEEN = 0.06
"""Share of the time that a plan leaves to validations; before the first it only seems to end too early by that."""

WORTH_TELLING = 0.2
"""Share of the updates by which a plan differs from the one that was told before."""


class TimeLimit(Callback):
    """Plans the number of updates of a run that is given a time, and ends it with them.

    The plan is what the schedule of the learning rate, and all else that depends on the length of a run, goes by. It
    is made from the seconds that updates take here, and kept: another takes its place only where it would miss the
    end of the time. So a run on a quiet machine is repeatable by its number of updates. Where the learning rate falls
    already, it goes on falling from where it is, to the end of the other plan. Both are saved with the checkpoint.

    Where validations are counted through the epochs, as those of ``mmrec train``, one is half-way through the plan,
    also where that is another now: it is added where none of the others would be.

    Args:
        minutes: of training and validation, over all resumptions of the run; None for no limit.
        planned_steps: number of updates to plan with at first; found by the first updates if left out.

    Attributes:
        planned_steps: the plan.
        decisions: each plan, as (update at which it was made, seconds of training before it, updates planned).
    """

    def __init__(self, minutes: float | None = None, planned_steps: int | None = None) -> None:
        if minutes is not None and not 0 < minutes < MOST_MINUTES:
            raise UserError(f"time_limit.minutes is {minutes}; it must be more than 0 and less than {MOST_MINUTES:,}")
        if planned_steps is not None and planned_steps < 1:
            raise UserError(f"time_limit.planned_steps is {planned_steps}; it must be at least 1")
        if planned_steps is not None and minutes is None:
            raise UserError("time_limit.planned_steps is for time_limit.minutes; give trainer.max_steps without")
        self.minutes = minutes
        self.planned_steps = planned_steps
        self.decisions: list[tuple[int, float, int]] = []
        self._seconds_before = 0.0  # of the processes before this one
        self._start = 0.0
        self._evaluating = 0.0  # seconds of this process
        self._evaluation = 0.0  # seconds of the latest
        self._evaluation_start = 0.0
        self._pace = 0.0  # seconds of an update, without validations
        self._recent: deque[tuple[int, float]] = deque()
        self._fall: tuple[float, int] | None = None  # updates between which the learning rate falls
        self._first_step = 0
        self._time_is_new = False
        self._told: int | None = None
        self._validated = 0  # updates before the latest validation
        self._half_way: int | None = None  # updates before the validation that was added

    @property
    def seconds(self) -> float:
        """Seconds of training and validation so far."""
        return self._seconds_before + (time.perf_counter() - self._start if self._start else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.minutes is None:
            return
        self._start = time.perf_counter()
        self._first_step = trainer.global_step
        validate_also(trainer, lambda: self._half_way == trainer.global_step and not is_accumulating(trainer))
        if self._pace and self._time_is_new:
            self._decide(trainer, pl_module, trainer.strategy.broadcast(self._affordable(trainer)))
        elif self.planned_steps is not None:
            self._decide(trainer, pl_module, self.planned_steps)
        if self.planned_steps is not None and trainer.global_step >= self.planned_steps:
            rank_zero_info(f"The time of this run is used: all of its {trainer.global_step:,} updates are made")
            trainer.should_stop = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = time.perf_counter() - self._evaluation_start
        self._evaluating += self._evaluation
        self._validated = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.minutes is None or is_accumulating(trainer):
            return
        step = trainer.global_step
        if step % CHECK_EVERY == 0 and step >= self._first_step + WARM_UP:
            self._measure(step)
            self._reconsider(trainer, pl_module)
        if self.planned_steps is not None and step >= self.planned_steps:
            self.decisions.append((step, self.seconds, step))
            trainer.should_stop = True
        assert isinstance(pl_module, RecurrentLMModule)
        if self._lacks_half_way(trainer, pl_module.planned_steps):
            self._half_way = step

    def _lacks_half_way(self, trainer: Trainer, planned: int | None) -> bool:
        """Whether the training is half-way, and no validation was there, nor is one to come soon enough."""
        step, every = trainer.global_step, trainer.val_check_batch
        if planned is None or trainer.check_val_every_n_epoch is not None or not isinstance(every, int):
            return False
        if self._validated >= BEGIN * planned or not planned <= 2 * step <= 2 * LATEST * planned:
            return False
        batches = LATEST * planned * trainer.accumulate_grad_batches
        return batches // every * every < trainer.fit_loop.total_batch_idx + 1

    def _measure(self, step: int) -> None:
        """Take the pace of the latest third of this process's updates."""
        training = time.perf_counter() - self._start - self._evaluating
        self._recent.append((step, training))
        while len(self._recent) > 2 and self._recent[0][1] < training * 2 / 3:
            self._recent.popleft()
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        if last > first:
            self._pace = (end - begin) / (last - first)

    def _reconsider(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make another plan where the one that there is would miss the end of the time."""
        assert isinstance(pl_module, RecurrentLMModule)
        # By the clock of the first process: all must decide the same.
        steps = trainer.strategy.broadcast(self._better_plan(trainer))
        if steps is not None:
            self._decide(trainer, pl_module, steps)

    def _better_plan(self, trainer: Trainer) -> int | None:
        """Return the number of updates that there is time for, if it is to take the place of the plan's."""
        assert self.minutes is not None
        if not self._pace:
            return None
        step, affordable = trainer.global_step, self._affordable(trainer)
        if self.planned_steps is None:
            return affordable
        missed = (self.planned_steps - affordable) * self._seconds_per_step(step) / (60 * self.minutes)
        early = -missed - (0 if self._evaluating else UNSEEN)
        return affordable if missed > TOO_LATE or early > TOO_EARLY else None

    def _seconds_per_step(self, step: int) -> float:
        """Seconds of an update and its share of the validations."""
        return self._pace + self._evaluating / max(1, step - self._first_step)

    def _affordable(self, trainer: Trainer) -> int:
        """Return the number of updates at which the time is up, with a validation at the end, or ``max_steps``."""
        assert self.minutes is not None
        step, left = trainer.global_step, 60 * self.minutes - self.seconds - self._evaluation
        steps = step + max(0, int(left / self._seconds_per_step(step)))
        return min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps

    def _decide(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        assert isinstance(pl_module, RecurrentLMModule)
        step, options = trainer.global_step, pl_module.options
        if self._fall is None:
            self._fall = decay_start(options, steps), steps
        elif self._fall[1] != steps:
            self._fall = decay_start_of_other_plan(step, options, *self._fall, steps), steps
        self.planned_steps = steps
        self.decisions.append((step, self.seconds, steps))
        pl_module.plan_steps(steps, self._fall[0])
        self._tell(pl_module.planned_steps or steps)  # fewer where the options end the run before

    def _tell(self, steps: int) -> None:
        """Say it where a plan differs much from the one that was told."""
        if self._told is None:
            self._told = steps
        elif abs(steps - self._told) > WORTH_TELLING * self._told:
            rank_zero_info(f"Planned {steps:,} updates instead of {self._told:,}: the machine's pace changed")
            self._told = steps

    def state_dict(self) -> dict[str, Any]:
        if self.minutes is None:
            return {}
        return {
            "minutes": self.minutes,
            "seconds": self.seconds,
            "planned_steps": self.planned_steps,
            "fall": self._fall,
            "pace": self._pace,
            "decisions": list(self.decisions),
            "validated": self._validated,
            "half_way": self._half_way,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the plan that was saved, or with another where the time is another now."""
        if not state_dict:
            return
        self._seconds_before = state_dict["seconds"]
        self._pace = state_dict["pace"]
        self._time_is_new = state_dict["minutes"] != self.minutes
        self._validated = state_dict.get("validated", 0)
        self._fall = state_dict.get("fall")
        self._half_way = state_dict.get("half_way")
        self.decisions = [tuple(one) for one in state_dict["decisions"]]
        if not self._time_is_new:
            self.planned_steps = state_dict["planned_steps"]
