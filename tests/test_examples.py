"""The programs and the notebook in examples/ run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from processes import run_program

EXAMPLES = REPOSITORY / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
NOTEBOOK = json.loads((EXAMPLES / "what_the_state_remembers.ipynb").read_text(encoding="utf-8"))


def run(folder: Path, *arguments: str) -> str:
    """Run Python in ``folder`` as a user does, warnings shown; return what it printed, which has no error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "Agg"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def run_forked(folder: Path, program: Path, *arguments: str) -> str:
    """The same in a process that has imported all that trains, which takes seconds."""
    said = run_program(folder, program, *arguments)
    assert "Warning" not in said
    return said


def figures(pattern: str, output: str) -> list[float]:
    found = re.search(pattern, output)
    assert found is not None, output
    return [float(figure) for figure in found.groups()]


def test_train_on_your_text_and_read_a_book(tmp_path: Path, text: str) -> None:
    """The second example takes up what the first one wrote."""
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    output = run(tmp_path, str(EXAMPLES / "train_on_your_text.py"), "mine.txt", "--updates=40")
    (loss,) = figures(r"validation: ([\d.]+) nats/token after 40 updates", output)
    assert loss < 3.0  # log(256) = 5.5 before it has learned anything

    output = run_forked(tmp_path, EXAMPLES / "read_a_book.py")
    read, unread = figures(r"what follows: ([\d.]+) nats/token after the book, ([\d.]+) without it", output)
    assert read < unread
    assert (tmp_path / "book.mem").stat().st_size < 100_000


def test_your_own_layer(tmp_path: Path) -> None:
    output = run_forked(tmp_path, EXAMPLES / "your_own_layer.py")
    (loss,) = figures(r"loss of the last update: ([\d.]+)", output)
    assert loss < 0.5


def test_the_page_on_sweeps_shows_the_programs() -> None:
    page = (REPOSITORY / "docs" / "sweeps.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for name, part in zip(("sweep.py", "sweep_ray.py"), shown, strict=True):
        assert (EXAMPLES / name).read_text(encoding="utf-8").endswith(part)
        assert len(part.split("def train")[1].splitlines()) <= 24


@pytest.mark.slow
def test_a_sweep(tmp_path: Path, prepared: Path) -> None:
    pytest.importorskip("optuna")
    small = ["--model.config={dim: 16, layers: 2, heads: 2, ffn_dim: 24}", "--data.seq_len=64", "--data.batch_size=2"]
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
    output = run(tmp_path, str(EXAMPLES / "sweep.py"), f"--data.data_dir={prepared}", *small, *steps)
    (loss,) = figures(r"lowest loss: ([\d.]+) with", output)
    assert 0 < loss < 6
    assert (tmp_path / "lightning_logs" / "sweep-1").is_dir()


def test_notebooks_are_stored_without_results() -> None:
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells, one after the other in one namespace, with fewer updates."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    program = "\n".join(cells)
    assert program.count("UPDATES = 150") == 1
    (tmp_path / "cells.py").write_text(program.replace("UPDATES = 150", "UPDATES = 60"), encoding="utf-8")
    (tmp_path / "train_on_your_text.py").write_bytes((EXAMPLES / "train_on_your_text.py").read_bytes())
    output = run_forked(tmp_path, tmp_path / "cells.py")
    carried, reset = figures(r"carried: ([\d.]+) nats/token; from an empty state on each page: ([\d.]+)", output)
    assert carried < reset
    one, all_pages = figures(r"bytes after one page and after all: (\d+) (\d+)", output)
    assert abs(one - all_pages) <= 8  # the count of tokens has more digits


@pytest.mark.slow
def test_the_notebook_for_colab_runs(tmp_path: Path, text: str) -> None:
    """Its cells as they are, with a short text and little time, where there is no Colab."""
    notebook = json.loads((EXAMPLES / "train_in_colab.ipynb").read_text(encoding="utf-8"))
    program = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert program.count("MINUTES = 5") == 1
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    (tmp_path / "cells.py").write_text(program.replace("MINUTES = 5", "MINUTES = 0.1"), encoding="utf-8")
    output = run_forked(tmp_path, tmp_path / "cells.py")
    assert "It writes:" in output
    assert "tokens read" in output
    assert "model.safetensors" in output.splitlines()[-1]
