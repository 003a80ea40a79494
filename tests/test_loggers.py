"""Measurements at validations go to every logger that takes them, not to TensorBoard's alone."""

from __future__ import annotations

import atexit
import csv
import importlib.util
import json
import os
import sqlite3
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from conftest import Command
from helpers import fit, losses
from lightning.pytorch.loggers import Logger
from processes import run

CSV = ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=tables"]
MEASURED = ("val_loss_by_position/from_0", "val_half_life/layer0_short", "val_state_norm/layer1_long", "val/loss")


class Notes:
    """An experiment as MLflow's client has one: it keeps texts as files."""

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        path = Path(run_id, artifact_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


class NotesLogger(Logger):
    """A logger that is nobody's subclass: a line of JSON for whatever it is given."""

    run_id = "notes"
    experiment = Notes()
    name = "notes"
    version = 0

    def write(self, what: str, content: Any, step: int | None = None) -> None:
        Path(self.run_id).mkdir(exist_ok=True)
        with open(Path(self.run_id) / "lines.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([what, content, step]) + "\n")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.write("metrics", {name: float(value) for name, value in metrics.items()}, step)

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.write("hyperparameters", params)


class TableLogger(NotesLogger):
    """The same with a table, as W&B's logger has it."""

    run_id = "tables"

    def log_text(
        self, key: str, columns: list[str], data: list[list[str]], dataframe: Any = None, step: int | None = None
    ) -> None:
        self.write(key, [columns, *data], step)


def choose_offline() -> None:
    """Let a process of its own do what these packages do at its end, and nothing over a network."""
    os.environ |= {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "COMET_START_ONLINE": "false"}
    os.environ |= {"COMET_OFFLINE_DIRECTORY": "comet", "COMET_DISABLE_ENV_DETAILS": "true"}
    Finalize(None, atexit._run_exitfuncs, exitpriority=0)  # multiprocessing leaves that out


def train(folder: Path, prepared: Path, *options: str) -> None:
    """Train in a process of its own: these packages leave threads and processes behind."""
    run(folder, *fit(prepared, "--trainer.max_epochs=2", "--run=a", *options), prepare=choose_offline)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_all_figures_settings_and_texts(tmp_path: Path, prepared: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    train(tmp_path, prepared, "--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db")
    tables = sqlite3.connect(tmp_path / "mlflow.db")
    steps: dict[str, list[int]] = {}
    for name, step in tables.execute("select key, step from metrics order by step"):
        steps.setdefault(name, []).append(step)
    settings = {name for (name,) in tables.execute("select key from params")}
    tables.close()
    assert all(steps[name] == [20, 41] for name in MEASURED)
    assert "train/loss" in steps
    assert any(name.endswith("learning_rate") for name in settings)
    texts = sorted(path.name for path in tmp_path.rglob("artifacts/sample/*.txt"))
    assert texts == ["20.txt", "41.txt"]


@pytest.mark.slow
def test_weights_and_biases_offline_has_all_figures(tmp_path: Path, prepared: Path) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    train(tmp_path, prepared, "--trainer.logger=WandbLogger", "--trainer.logger.offline=true")
    (written,) = tmp_path.rglob("run-*.wandb")
    content = written.read_bytes()
    for name in (*MEASURED, "train/loss", "learning_rate", "sample"):
        assert name.encode() in content, name


@pytest.mark.slow
def test_comet_offline_has_all_figures_settings_and_texts(tmp_path: Path, prepared: Path) -> None:
    if importlib.util.find_spec("comet_ml") is None:
        pytest.skip("comet_ml is not installed")
    train(tmp_path, prepared, "--trainer.logger=CometLogger")
    (written,) = (tmp_path / "comet").glob("*.zip")
    with ZipFile(written) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    for name in MEASURED:
        assert [metric["step"] for metric in metrics if metric["metricName"] == name] == [20, 41], name
    assert "train/loss" in {metric["metricName"] for metric in metrics}
    settings = {line["payload"]["param"]["paramName"] for line in lines if line["type"] == "parameter_msg"}
    assert "learning_rate" in settings
    files = [line["payload"] for line in lines if line["type"] == "file_upload"]
    samples = [file["additional_params"]["step"] for file in files if file["metadata"].get("name") == "sample"]
    assert samples == [20, 41]


def read(folder: str) -> list[list[Any]]:
    return [json.loads(line) for line in Path(folder, "lines.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_logger_gets_the_measurements(mmrec: Command, prepared: Path) -> None:
    loggers = ["TensorBoardLogger", "CSVLogger", f"{__name__}.NotesLogger", f"{__name__}.TableLogger"]
    chosen = [f"--trainer.logger+={name}" for name in loggers]
    chosen.insert(1, "--trainer.logger.save_dir=board")
    chosen.insert(3, "--trainer.logger.save_dir=table")
    assert mmrec(*fit(prepared, *chosen, "--trainer.max_epochs=2", "--run=a")) == 0

    (table,) = Path("table").rglob("metrics.csv")
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in MEASURED:
        assert [int(row["step"]) for row in rows if row[name]] == [20, 41], name
    assert [row["val/best_loss"] for row in rows if row["val/best_loss"]]

    for folder in ("notes", "tables"):
        lines = read(folder)
        metrics = [(content, step) for what, content, step in lines if what == "metrics"]
        for name in MEASURED:
            assert [step for content, step in metrics if name in content] == [20, 41], name
        assert any(what == "hyperparameters" and "learning_rate" in content for what, content, _ in lines)
    samples = [content for what, content, _ in read("tables") if what == "sample"]
    assert [columns for columns, _ in samples] == [["sample"]] * 2
    texts = [Path("notes/sample", f"{step}.txt").read_text(encoding="utf-8") for step in (20, 41)]
    assert [row[0] for _, row in samples] == texts
    assert all(len(text) == 300 for text in texts)

    assert list(losses("version_0", "val_half_life/layer0_short", Path("board"))) == [20, 41]
