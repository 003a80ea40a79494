"""A search of two settings with Optuna; several processes may run it at once, and it goes on where it was stopped."""

import csv
import subprocess
import sys
from pathlib import Path

import optuna


def train(trial: optuna.Trial) -> float:
    """Train once, with the options of ``mmrec fit`` that were typed, and return the lowest validation loss."""
    run = f"sweep-{trial.number}"
    chosen = {
        "model.learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
        "model.dropout": trial.suggest_float("dropout", 0.0, 0.3),
    }
    line = [sys.executable, "-m", "mmrec", "fit", "--run", run, *sys.argv[1:]]
    line += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir=sweep/{run}"]
    subprocess.run([*line, *(f"--{name}={value}" for name, value in chosen.items())], check=True)
    (table,) = Path("sweep", run).rglob("metrics.csv")
    with open(table, encoding="utf-8", newline="") as file:
        return min(float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])


if __name__ == "__main__":
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(
        storage="sqlite:///sweep.db", study_name="sweep", sampler=sampler, load_if_exists=True
    )
    study.optimize(train, n_trials=2)
    print(f"lowest loss: {study.best_value:.4f} with {study.best_params}")
