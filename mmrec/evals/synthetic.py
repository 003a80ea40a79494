"""``mmrec eval`` of a synthetic task: accuracy of models of equal size, trained on the same rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmrec.core.devices import AUTO, check_device_name, find_device
from mmrec.core.errors import UserError
from mmrec.core.files import refuse_to_replace_picture
from mmrec.evals.models import check_model
from mmrec.evals.recipes import FULL, SMALL
from mmrec.evals.report import print_table, save, save_plot
from mmrec.evals.tasks import Task
from mmrec.evals.training import Recipe, train


@dataclass(frozen=True)
class SyntheticOptions:
    """Models, seeds and size of an evaluation.

    Args:
        models: mmrec, mmrec-negative (with negative eigenvalues), gpt, lstm, mingru, mamba2.
        seeds: of weights and rows, one training each.
        size: of the recipe: small for two cores, full as published (mqar and passkey).
        steps: updates of every model; the recipe's if left out.
        output_dir: folder for TASK.json and TASK.png.
        device: compute on auto, cpu, cuda, mps or cuda:NUMBER; auto takes a GPU where one works.

    Raises:
        UserError: a name is unknown, a package is missing, or a number is not positive.
    """

    models: Sequence[str] = ("mmrec",)
    seeds: Sequence[int] = (0,)
    size: Literal["small", "full"] = "small"
    steps: int | None = None
    output_dir: Path = Path("eval")
    device: str = AUTO

    def __post_init__(self) -> None:
        check_device_name(self.device)
        for name in self.models:
            check_model(name)
        if not self.models or not self.seeds or min(self.seeds) < 0:
            raise UserError("--models and --seeds each need one entry at least, and a seed cannot be negative")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps is {self.steps}; it must be at least 1")

    def recipe(self, task: str) -> Recipe:
        """Return the recipe of ``task``; UserError where there is none of this size."""
        recipes = SMALL if self.size == "small" else FULL
        if task not in recipes:
            raise UserError(f"{task} has no recipe of size {self.size}; {self.size} exists for {', '.join(recipes)}")
        return recipes[task] if self.steps is None else dataclasses.replace(recipes[task], steps=self.steps)


def evaluate_synthetic(task: str, options: SyntheticOptions) -> None:
    """Train models of equal size on a task, each seed on its own, and test them at lengths trained on and beyond.

    Runs that output_dir already holds of the same recipe are kept: a second call adds models and seeds.
    """
    recipe, device = options.recipe(task), find_device(options.device)
    path = options.output_dir / f"{task}.json"
    refuse_to_replace_picture(options.output_dir / f"{task}.png", "--output_dir")
    results: dict[str, Any] = {"task": task, "recipe": described(recipe), "runs": {}}
    if path.exists():
        before = _read(path)
        if before.get("recipe") != results["recipe"]:
            raise UserError(f"{path}: of another recipe; give another --output_dir")
        results["runs"] = before["runs"]
    runs: dict[str, dict[str, Any]] = results["runs"]
    for name in options.models:
        for seed in options.seeds:
            if str(seed) not in runs.setdefault(name, {}):
                runs[name][str(seed)] = train(name, recipe, seed, device)
                save(path, results)
    show(task, recipe, runs)
    save_plot(options.output_dir / f"{task}.png", lambda axes: _draw(axes, recipe.task(), recipe, runs))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a file of results; give another --output_dir") from error
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        raise UserError(f"{path}: not a file of results; give another --output_dir")
    return found


def described(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON holds it, to tell whether two are the same."""
    plain = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    plain |= {"task": type(recipe.task()).__name__, "config": recipe.config.as_dict()}
    described: dict[str, Any] = json.loads(json.dumps(plain))
    return described


def accuracies(runs: dict[str, Any], level: int) -> list[float]:
    """Return the accuracy of each seed at ``level``, of the seeds that could be tested there."""
    return [found for run in runs.values() if (found := run["accuracy"][str(level)]) is not None]


def show(task: str, recipe: Recipe, runs: dict[str, dict[str, Any]]) -> None:
    """Print the accuracy of each model at each level: the mean over seeds, the lowest and the highest."""
    made = recipe.task()
    rows = []
    for name, by_seed in runs.items():
        cells = []
        for level in recipe.test_levels:
            found = accuracies(by_seed, level)
            cells.append(_percent(found) if found else "-")
        first = next(iter(by_seed.values()))
        seconds = sum(run["seconds"] for run in by_seed.values()) / len(by_seed)
        rows.append([name, *cells, f"{first['layer_parameters']:,}", f"{seconds:.0f}", str(len(by_seed))])
    chance = [f"{100 * made.chance(level):.1f}" for level in recipe.test_levels]
    rows.append(["chance", *chance, "", "", ""])
    heads = [f"{level:,}" for level in recipe.test_levels]
    trained = f"trained up to {max(recipe.train_levels):,}, {recipe.steps:,} updates"
    title = f"{task}: {made.about}; accuracy in % by {made.unit} ({trained})"
    print_table(title, ["", *heads, "parameters in layers", "seconds", "seeds"], rows)


def _percent(found: Sequence[float]) -> str:
    mean = f"{100 * sum(found) / len(found):.1f}"
    return mean if len(found) == 1 else f"{mean} ({100 * min(found):.1f} to {100 * max(found):.1f})"


def _draw(axes: Any, task: Task, recipe: Recipe, runs: dict[str, dict[str, Any]]) -> None:
    for number, (name, by_seed) in enumerate(runs.items()):
        at = [level for level in recipe.test_levels if accuracies(by_seed, level)]
        means = [100 * sum(found) / len(found) for found in (accuracies(by_seed, level) for level in at)]
        axes.plot(at, means, marker="o", color=f"C{number}", label=name)
    axes.plot(recipe.test_levels, [100 * task.chance(level) for level in recipe.test_levels], "k:", label="chance")
    axes.axvline(max(recipe.train_levels), color="gray", linewidth=1, label="longest in training")
    axes.set(xscale="log", xlabel=task.unit, ylabel="accuracy, %", ylim=(-3, 103), title=task.about)
