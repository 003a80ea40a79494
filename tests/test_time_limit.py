"""A training that is given minutes: the updates that are planned in them, the schedule that ends with them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from helpers import assert_same_training, checkpoints, fit, last, load, losses
from torch.optim.lr_scheduler import LambdaLR

from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.core.errors import UserError
from mmrec.training.callbacks import checkpoint_io
from mmrec.training.callbacks.half_way import BEGIN, LATEST
from mmrec.training.callbacks.time_limit import TimeLimit
from mmrec.training.options import OptimizerOptions
from mmrec.training.schedule import decay_start, learning_rate_share

WSD = OptimizerOptions(schedule="wsd", decay_ratio=0.25, warmup_steps=10, min_lr_ratio=0.1)


def test_the_rate_is_constant_and_falls_at_the_end() -> None:
    shares = [learning_rate_share(step, WSD, 100) for step in range(110)]
    assert shares[0] == 0.1
    assert shares[9:76] == [1.0] * 67
    assert decay_start(WSD, 100) == 75
    assert all(after < before for before, after in itertools.pairwise(shares[75:101]))
    assert shares[100:] == [pytest.approx(0.1)] * 10
    assert learning_rate_share(10**6, WSD, None) == 1.0


class Clock:
    """A clock of which each update takes as long as is told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pace = 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Takes the place of the clock of the time limit; an update takes ``pace`` seconds."""
    from mmrec.training.callbacks import time_limit
    from mmrec.training.module import RecurrentLMModule

    clock, before = Clock(), RecurrentLMModule.training_step
    monkeypatch.setattr(time_limit, "time", clock)

    def training_step(self: RecurrentLMModule, *args: Any) -> Any:
        clock.now += clock.pace
        return before(self, *args)

    monkeypatch.setattr(RecurrentLMModule, "training_step", training_step)
    return clock


def limited(prepared: Path, *more: object) -> list[str]:
    endless = ["--trainer.max_epochs=-1", "--model.schedule=wsd", "--trainer.logger=false"]
    return fit(prepared, *endless, *more)


def logged(command: list[str]) -> list[str]:
    """Return ``command`` with the logger that it leaves out."""
    return [option for option in command if option != "--trainer.logger=false"]


def plan_of(run: str, name: str = "last") -> dict[str, Any]:
    states = load(checkpoints(run) / f"{name}.ckpt")["callbacks"]
    return next(state for key, state in states.items() if key.startswith("TimeLimit"))


def best_score(name: str) -> float:
    states = load(checkpoints("a") / f"{name}.ckpt")["callbacks"]
    return next(float(state["best_model_score"]) for key, state in states.items() if key.startswith("Best"))


@pytest.mark.usefixtures("clock")
def test_a_run_ends_with_its_time_and_its_rate_with_it(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*limited(prepared, "--run=a", "--time_limit.minutes=1")) == 0
    end = last("a")
    assert 58 <= end["global_step"] <= 60
    assert plan_of("a")["planned_steps"] == end["global_step"]
    assert end["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0.05 * 3e-3)
    assert load(checkpoints("a") / "best.ckpt")["global_step"] == end["global_step"]  # validated at its end
    assert mmrec(*limited(prepared, "--run=a", "--time_limit.minutes=1", "--ckpt_path=last")) == 0
    assert_same_training(end, last("a"))  # there is nothing more to do


@pytest.mark.usefixtures("clock")
def test_lightnings_own_limit_of_time_is_planned_with_too(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*limited(prepared, "--run=a", "--trainer.max_time=00:00:00:30")) == 0
    assert 28 <= last("a")["global_step"] <= 30
    assert last("a")["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0.05 * 3e-3)


def test_a_plan_is_kept_while_it_holds(mmrec: Command, prepared: Path, clock: Clock) -> None:
    clock.pace = 0.99
    assert mmrec(*limited(prepared, "--run=a", "--time_limit.minutes=1", "--time_limit.planned_steps=60")) == 0
    assert last("a")["global_step"] == 60
    assert [steps for _, _, steps in plan_of("a")["decisions"]] == [60, 60]  # at the start, and reached


@pytest.mark.parametrize(("pace", "least", "most"), [(2.0, 28, 31), (0.5, 110, 121)])
def test_another_pace_makes_another_plan(
    mmrec: Command, prepared: Path, clock: Clock, pace: float, least: int, most: int
) -> None:
    clock.pace = pace
    assert mmrec(*limited(prepared, "--run=a", "--time_limit.minutes=1", "--time_limit.planned_steps=60")) == 0
    assert least <= last("a")["global_step"] <= most


@pytest.mark.parametrize(("pace", "least", "most"), [(2.0, 86, 92), (0.25, 130, 168)])
def test_a_rate_that_falls_goes_on_falling_where_the_pace_changes(
    mmrec: Command, prepared: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, pace: float, least: int, most: int
) -> None:
    """It began to fall at 75 of 100 updates of a second each; from update 78 on each takes ``pace`` seconds."""
    from mmrec.training.callbacks import time_limit
    from mmrec.training.module import RecurrentLMModule

    rates: list[float] = []
    before = RecurrentLMModule.training_step

    def training_step(self: RecurrentLMModule, *args: Any) -> Any:
        clock.pace = pace if self.global_step >= 78 else 1.0
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        rates.append(float(scheduler.get_last_lr()[0]))
        return before(self, *args)

    monkeypatch.setattr(RecurrentLMModule, "training_step", training_step)
    monkeypatch.setattr(time_limit, "CHECK_EVERY", 2)
    limits = ["--run=a", f"--time_limit.minutes={100 / 60}", "--time_limit.planned_steps=100"]
    assert mmrec(*limited(prepared, *limits, "--model.warmup_steps=5")) == 0
    assert least <= len(rates) <= most
    assert len(plan_of("a")["decisions"]) > 2
    assert rates[5:75] == [3e-3] * 70
    assert all(after < before for before, after in itertools.pairwise(rates[75:]))
    assert last("a")["lr_schedulers"][0]["_last_lr"][0] < 0.15 * 3e-3
    assert 0.89 * 100 < plan_of("a")["seconds"] < 1.05 * 100


def half_way(steps: Iterable[int], planned: int) -> list[int]:
    return [step for step in steps if BEGIN * planned <= step <= LATEST * planned]


VALIDATED = ["--trainer.check_val_every_n_epoch=null", "--trainer.limit_val_batches=1", "--run=a"]
IN_A_MINUTE = ["--time_limit.minutes=1", "--time_limit.planned_steps=60"]


@pytest.mark.parametrize(("pace", "every"), [(1.25, 15), (0.5, 50), (1.0, 25), (1.0, 20), (0.5, 15)])
def test_one_validation_is_half_way_through_another_plan_too(
    mmrec: Command, prepared: Path, clock: Clock, pace: float, every: int
) -> None:
    clock.pace = pace
    options = [*VALIDATED, f"--trainer.val_check_interval={every}", *IN_A_MINUTE]
    assert mmrec(*logged(limited(prepared, *options))) == 0
    planned = last("a")["global_step"]
    steps = {step + 1 for step in losses("a", "val/loss")}
    grid = {*range(every, planned, every)}
    assert grid <= steps
    assert half_way(steps, planned)
    assert steps - grid - {planned} == (set() if half_way(grid, planned) else {*half_way(steps, planned)})
    assert len(steps - grid - {planned}) <= 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_that_is_stopped_about_an_added_validation_ends_with_the_same_bits(
    mmrec: Command, prepared: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, accumulated: int
) -> None:
    clock.pace = 0.5 / accumulated
    options = ["--trainer.val_check_interval=50", f"--trainer.accumulate_grad_batches={accumulated}"]
    command = logged(limited(prepared, *VALIDATED, *options, *IN_A_MINUTE, "--last.every_n_train_steps=1"))
    saved: list[tuple[int, Path]] = []

    def also_keep(checkpoint: dict[str, Any], target: Path, previous: Path | None = None) -> None:
        write_checkpoint(checkpoint, target, previous)
        if target.name == "last.ckpt":
            saved.append((checkpoint["global_step"], Path(f"{len(saved)}.ckpt")))
            shutil.copy(target, saved[-1][1])

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "write_checkpoint", also_keep)
        assert mmrec(*command) == 0
    end, scores = last("a"), losses("a", "val/loss")
    half = plan_of("a")["half_way"]
    assert half is not None
    about = [path for step, path in saved if abs(step - half) <= 1]
    assert len(about) == 4  # two of the update itself: before its validation, and after it
    shutil.copytree("lightning_logs/a", "whole")
    for path in about:
        shutil.rmtree("lightning_logs/a")
        shutil.copytree("whole", "lightning_logs/a")
        shutil.copy(path, checkpoints("a") / "last.ckpt")
        assert mmrec(*command, "--ckpt_path=last") == 0
        assert_same_training(end, last("a"))
        assert losses("a", "val/loss") == scores


@pytest.mark.usefixtures("clock")
def test_a_longer_run_goes_on_from_before_the_rate_fell_and_never_loses_its_best(
    mmrec: Command, prepared: Path
) -> None:
    assert mmrec(*limited(prepared, "--run=a", "--time_limit.minutes=1")) == 0
    score = best_score("best")
    stable = load(checkpoints("a") / "stable.ckpt")
    options = OptimizerOptions(schedule="wsd", warmup_steps=1)
    assert stable["global_step"] == decay_start(options, last("a")["global_step"])
    assert stable["lr_schedulers"][0]["_last_lr"][0] == 3e-3
    path = checkpoints("a") / "stable.ckpt"
    longer = [
        "--run=a",
        f"--ckpt_path={path}",
        "--time_limit.minutes=1.5",
        "--model.learning_rate=0",
    ]
    assert mmrec(*limited(prepared, *longer)) == 0  # at a rate by which it learns nothing more
    assert 86 <= last("a")["global_step"] <= 91
    assert best_score("last") == best_score("best") == score
    assert load(checkpoints("a") / "best.ckpt")["global_step"] == 60


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"minutes": 0.0}, "more than 0"),
        ({"minutes": 1e7}, "and less than 5,256,000"),
        ({"minutes": 1.0, "planned_steps": 0}, "at least 1"),
        ({"planned_steps": 5}, "trainer.max_steps"),
    ],
)
def test_a_limit_that_is_none_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        TimeLimit(**options)
