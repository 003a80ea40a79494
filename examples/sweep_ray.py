"""Search two settings with Ray Tune, two runs at once: the options of ``mmrec fit`` go after the program's name."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from ray import tune

OPTIONS, FOLDER = sys.argv[1:], Path.cwd()  # of this program: a trial is a process of Ray's, in a folder of its own


def train(chosen: dict[str, float]) -> dict[str, float]:
    """Train once, with the options of ``mmrec fit`` that were typed, and return the lowest validation loss."""
    run = f"tune-{tune.get_context().get_trial_id()}"
    line = [sys.executable, "-m", "mmrec", "fit", "--run", run, *OPTIONS]
    line += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir=sweep/{run}"]
    subprocess.run([*line, *(f"--{name}={value}" for name, value in chosen.items())], check=True, cwd=FOLDER)
    (table,) = (FOLDER / "sweep" / run).rglob("metrics.csv")
    with open(table, encoding="utf-8", newline="") as file:
        return {"loss": min(float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])}


if __name__ == "__main__":
    space = {"model.learning_rate": tune.loguniform(1e-3, 1e-2), "model.dropout": tune.uniform(0.0, 0.3)}
    how = tune.TuneConfig(metric="loss", mode="min", num_samples=4, max_concurrent_trials=2)
    best = tune.Tuner(train, param_space=space, tune_config=how).fit().get_best_result()
    print(f"lowest loss: {(best.metrics or {})['loss']:.4f} with {best.config}")
