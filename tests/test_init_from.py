"""A model that is there already: another training begins with its weights, and it is scored without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import QUICK, checkpoints, fit

from mmrec.checkpoints.loading import load_model

SETTINGS = [option for option in QUICK if not option.startswith("--model.config")]
STILL = ["--model.learning_rate=0", "--trainer.max_epochs=-1", "--trainer.max_steps=2"]


@pytest.fixture
def model(mmrec: Command, small_root: Path, tmp_path: Path) -> Path:
    """The model of the run "a", as one file, with the tokens that it was trained on beside it."""
    shutil.copytree(small_root / "tokens", tmp_path / "tokens")
    assert mmrec("export", "--format=safetensors", "--output_dir=model", f"--root={small_root}") == 0
    return tmp_path / "model" / "model.safetensors"


def weights(path: Path) -> dict[str, Any]:
    return load_model(path).net.state_dict()


def begin(*more: str) -> list[str]:
    return ["fit", *SETTINGS, "--data.data_dir=tokens", *more]


def test_the_first_update_begins_with_its_weights(
    mmrec: Command, model: Path, small_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(small_root / "lightning_logs" / "a")
    for number, path in enumerate((str(model), run, f"{run}/checkpoints/best.ckpt")):
        assert mmrec(*begin(*STILL, f"--init_from={path}", f"--run={number}")) == 0
        found = weights(checkpoints(str(number)) / "last.ckpt")
        expected = weights(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert mmrec(*begin(*STILL, "--init_from=last", "--run=again")) == 0
    assert "Initialized with the weights of" in caplog.text
    assert mmrec(*begin("--trainer.max_steps=2", f"--init_from={model}", "--run=learns")) == 0
    learned = weights(checkpoints("learns") / "last.ckpt")
    assert not torch.equal(learned["embedding.weight"], expected["embedding.weight"])


def test_its_shape_comes_with_it_and_its_settings_do_not(mmrec: Command, model: Path) -> None:
    assert mmrec(*begin("-c", "tiny", *STILL, f"--init_from={model}", "--run=b")) == 0
    net = load_model(checkpoints("b") / "last.ckpt").net
    assert net.config == load_model(model).net.config
    assert "weight_decay: 0.5" in Path("lightning_logs/b/config.yaml").read_text()


def test_going_on_does_not_need_it_any_more(mmrec: Command, model: Path) -> None:
    assert mmrec(*begin("--trainer.max_steps=2", f"--init_from={model}", "--run=b")) == 0
    model.unlink()
    assert mmrec("fit", "--run=b", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert load_model(checkpoints("b") / "last.ckpt").step == 4


def test_it_is_scored_without_a_training(
    mmrec: Command, model: Path, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(path: Path | str, *more: str) -> str:
        assert mmrec("validate", f"--ckpt_path={path}", "--data.data_dir=tokens", *more) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation"))

    best = small_root / "lightning_logs/a/checkpoints/best.ckpt"
    assert score(model) == score(best)
    alone = Path("alone.ckpt")
    shutil.copy(best, alone)
    assert score(alone, "--window=64") == score(model, "--window=64")
    assert mmrec("predict", f"--ckpt_path={model}", "--data.data_dir=tokens") == 0
    scored = len(Path("tokens/val.txt").read_text()) - 1
    assert f"predictions.tsv: {scored:,} tokens" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(
    mmrec: Command, model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text)
    assert mmrec("prepare", "--input_file=text.txt", "--output_dir=bytes", "--tokenizer=bytes") == 0
    init = f"--init_from={model}"
    capsys.readouterr()
    for arguments, says in (
        (begin(init, "--data.data_dir=bytes"), "another tokenizer"),
        (fit(Path("tokens"), init, "--model.config.layers=3"), "another architecture: layers 2 there, 3 here"),
        (begin("--init_from=nowhere"), "nowhere: no such checkpoint"),
        (begin("--init_from=text.txt"), "text.txt: not a readable checkpoint"),
        (begin(f"--ckpt_path={model}"), "no training to resume; begin one with its weights by --init_from"),
    ):
        assert mmrec(*arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()
