"""The study of plans: what its search compares a plan with."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.plan import (
    SHAPES,
    Batches,
    Text,
    TrainingPlan,
    choose_batches,
    fit_options,
    has_second_token,
    shapes_for,
)

TEXT = Text(1_000_000, 100_000, 65, 1.0, 2.5, 2.4)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return importlib.import_module("planning_search")


def a_plan(config: ModelConfig) -> TrainingPlan:
    return TrainingPlan(config, choose_batches(config, TEXT.train_tokens), 1000, TEXT, 2.0, 0.05)


def learning_rates(options: Iterable[str]) -> list[float]:
    pairs = (option.split("=") for option in options)
    return [float(value) for name, value in pairs if name == "--model.learning_rate"]


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.dim}x{config.layers}")
def test_a_plan_is_compared_with_16_other_trainings(search: ModuleType, config: ModelConfig) -> None:
    arms = list(search.arms(a_plan(config)))
    assert (arms[0].change, arms[0].options) == ("plan", ())
    assert len({arm.change for arm in arms}) == len(arms) == 17
    plan = (arms[0].config, arms[0].batches, arms[0].options)
    assert all((arm.config, arm.batches, arm.options) != plan for arm in arms[1:])


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.dim}x{config.layers}")
def test_a_neighbour_is_tried_about_the_rate_that_its_own_plan_has(search: ModuleType, config: ModelConfig) -> None:
    plan = a_plan(config)
    for arm in search.arms(plan):
        if ", rate x " in arm.change or arm.change.startswith("rate x"):
            (own,) = learning_rates(fit_options(replace(plan, config=arm.config, batches=arm.batches)))
            (tried,) = learning_rates(arm.options)
            assert tried == pytest.approx(own * float(arm.change.split()[-1]))


@pytest.mark.parametrize("vocab_size", [65, 4096])
def test_a_change_reads_as_many_tokens_as_there_is_time_for(
    search: ModuleType, vocab_size: int, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = replace(TEXT, vocab_size=vocab_size)
    plan = replace(a_plan(shapes_for(text)[1]), text=text)

    def pace(text: Text, config: ModelConfig, batches: Batches, second: bool | None = None) -> float:
        has_second = has_second_token(text) if second is None else second
        return 1e9 / layer_parameters(config) * batches.rows / (2 if has_second else 1)

    made: dict[str, int] = {}
    monkeypatch.setattr(search, "describe_text", lambda _: text)
    monkeypatch.setattr(search, "plan_by_trials", lambda *_: plan)
    monkeypatch.setattr(search, "rate", pace)
    monkeypatch.setattr(search, "bits_per_byte", lambda *_: 2.0)
    monkeypatch.setattr(search, "append", lambda _, __, row: made.update({row["change"]: row["tokens"]}))
    search.search(tmp_path / "table.csv", prepared, 60, 0)
    own = pace(text, plan.config, plan.batches)
    for arm in search.arms(plan):
        expected = plan.tokens * pace(text, *arm.paced) / own
        assert made[arm.change] == pytest.approx(expected, rel=0.02)
    assert made["twice the rows"] == pytest.approx(2 * plan.tokens, rel=0.02)
    change, times = ("no second token", 2) if vocab_size == 65 else ("second token", 0.5)
    assert made[change] == pytest.approx(times * plan.tokens, rel=0.02)
