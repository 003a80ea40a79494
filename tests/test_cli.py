"""The commands, as a user types them: what they do, what they leave, and how they end."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, Command
from helpers import BATCH, fit, last

from mmrec import __version__
from mmrec.checkpoints.loading import load_model

# The main job


def test_documents_are_needed_to_reset_at(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec(*fit(prepared, "--model.reset_at_documents=true")) == 2
    assert "needs text that is cut into documents" in capsys.readouterr().err


def test_fit_validate_and_generate(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=2", "--run=a")) == 0
    parameters = sum(p.numel() for p in load_model(Path("lightning_logs/a/checkpoints/last.ckpt")).net.parameters())
    assert re.search(rf"in all +{parameters:,} +\S+ numbers \(\d+ kB\)", caplog.text)
    files = {p.name for p in Path("lightning_logs/a").rglob("*")}
    assert {"config.yaml", "best.ckpt", "last.ckpt"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)

    capsys.readouterr()
    assert mmrec("validate", "--ckpt_path", "best", "--trainer.enable_progress_bar=false") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation (carried"))
    reported = float(line.split("): ")[1].split(" nats/token")[0])
    best = load_model(Path("lightning_logs/a/checkpoints/best.ckpt"))
    text = (prepared / "val.txt").read_text()
    tokens = torch.from_numpy(best.tokenizer.encode(text).astype("int64"))[None]
    with torch.no_grad():
        logits, _ = best.net(tokens[:, :-1], best.net.zero_state(1))
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    assert reported == pytest.approx(float(expected), abs=1e-4)
    assert f"(carried, {prepared})" in line
    assert mmrec("validate", "--ckpt_path", "best", "--trainer.limit_val_batches=1") == 0
    begin = f"(carried, {math.prod(BATCH)} of {tokens.numel():,} tokens of {prepared}): "
    of_part = torch.nn.functional.cross_entropy(logits[0, : math.prod(BATCH)], tokens[0, 1 : 1 + math.prod(BATCH)])
    said = capsys.readouterr().out.partition(f"validation {begin}")[2]
    assert float(said.split()[0]) == pytest.approx(float(of_part), abs=1e-4)
    assert "; --trainer.limit_val_batches=1.0 scores all\n" in said
    assert "scores all" not in line

    assert mmrec("generate", "--prompt", "to be", "--length", "50", "--seed", "3") == 0
    written = capsys.readouterr().out
    assert written.startswith("to be")
    assert len(written) == len("to be") + 50 + 1
    mmrec("generate", "--prompt", "to be", "--length", "50", "--seed", "3")
    assert capsys.readouterr().out == written


def test_tensorboard_shows_what_it_should(mmrec: Command, prepared: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert mmrec(*fit(prepared, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--run=a")) == 0
    board = EventAccumulator("lightning_logs/a")
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    wanted = {"train/loss", "train/grad_norm", "train/tokens_per_second", "val/loss", "val/bits_per_byte"}
    assert wanted <= scalars
    assert {"train/learning_rate", "val/best_loss"} <= scalars
    assert "epoch" not in scalars
    rates = [event.value for event in board.Scalars("train/learning_rate")]
    assert rates[0] == pytest.approx(0.003)  # after the warm-up of 5 updates
    assert rates == sorted(rates, reverse=True)
    assert board.Scalars("val/best_loss")[0].value == min(event.value for event in board.Scalars("val/loss"))
    assert board.PluginTagToContent("custom_scalars")
    assert len(board.Scalars("val/loss")) == 2
    assert "sample/text_summary" in board.Tags()["tensors"]
    assert board.PluginTagToContent("hparams")


def test_training_learns(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=8", "--run=a", "--trainer.logger=false")) == 0
    callbacks = last("a")["callbacks"]
    best = min(float(state["best_model_score"]) for state in callbacks.values() if state.get("best_model_score"))
    assert best < 2.2  # the 26 symbols of the text, at random: 3.2


def test_test_and_predict(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    quiet = ["--run=a", "--ckpt_path=last", "--trainer.enable_progress_bar=false"]
    assert mmrec("test", *quiet) == 0
    assert "test (carried" in capsys.readouterr().out
    assert mmrec("predict", *quiet) == 0
    lines = Path("lightning_logs/a/predictions.tsv").read_text().splitlines()
    assert len(lines) == len((prepared / "val.txt").read_text())  # a header, and every character but the first


def test_early_stopping_stops(mmrec: Command, prepared: Path) -> None:
    never_better = ["--early_stopping.min_delta=100", "--early_stopping.patience=2", "--trainer.max_epochs=20"]
    never_better.append("--data.seq_len=640")
    assert mmrec(*fit(prepared, *never_better, "--run=a")) == 0
    assert last("a")["epoch"] == 2


def test_another_corpus_with_bpe_and_adamw(
    mmrec: Command, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"{i} {text[i * 1500 : (i + 2) * 1500]}")
    assert (
        mmrec("prepare", "--input_dir", folder, "--output_dir", "d", "--tokenizer", "bpe", "--vocab_size", 300) == 0
    )
    assert mmrec(*fit(Path("d"), "--model.optimizer=adamw", "--trainer.max_epochs=1", "--run=a")) == 0
    (states,) = last("a")["optimizer_states"]
    kept = {name for one in states.get("members", [states]) for state in one["state"].values() for name in state}
    assert kept == {"step", "exp_avg", "exp_avg_sq"}
    capsys.readouterr()
    assert mmrec("generate", "--ckpt", "last", "--prompt", "que", "--length", 5) == 0
    trained = load_model(Path("lightning_logs/a/checkpoints/last.ckpt"))
    assert trained.tokenizer.vocab_size == 300
    written = capsys.readouterr().out.removesuffix("\n")
    assert written.startswith("que")
    assert len(written) > len("que")


# How they end


@pytest.mark.slow
def test_a_pipe_that_closes_and_ctrl_c_end_quietly(small_root: Path) -> None:
    command = [sys.executable, "-m", "mmrec", "generate", "--length=10000000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for stop, status, says in (("close", 141, ""), ("interrupt", 130, "mmrec: stopped by Ctrl-C")):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=small_root, env=environment, **pipes) as process:  # type: ignore[call-overload]
            assert process.stdout.read(9)
            if stop == "close":
                process.stdout.close()
            else:
                process.send_signal(signal.SIGINT)
                process.stdout.read()
            errors = process.stderr.read().decode()
        assert (process.returncode, errors.strip()) == (status, says)


@pytest.mark.slow
def test_a_process_without_standard_streams(prepared: Path, tmp_path: Path) -> None:
    """What would have been printed is lost; what would have been saved is not."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for arguments, closed, status in (
        (["fitt"], ">&-", 2),
        (["fitt"], "2>&-", 2),
        (fit(prepared, "--trainer.max_steps=4", "--run=a"), "<&- >&- 2>&-", 0),
    ):
        command = f"{shlex.join([sys.executable, '-m', 'mmrec', *arguments])} {closed}"
        ended = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=False)
        assert ended.returncode == status, command
    assert load_model(tmp_path / "lightning_logs" / "a" / "checkpoints" / "last.ckpt").step == 4


# Help


def test_help_names_every_command(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("prepare", "fit", "validate", "test", "predict", "generate"))
    for command in ("prepare", "generate", "fit"):
        assert mmrec(command, "--help") == 0
        shown = capsys.readouterr().out
        assert re.match(rf"usage: mmrec (\[options\] )?{command} ", shown)
        assert {"prepare": "--output_dir", "generate": "--prompt", "fit": "--ckpt_path"}[command] in shown
    assert mmrec("--version") == 0
    assert capsys.readouterr().out == f"mmrec {__version__}\n"


def test_every_option_of_ours_is_explained(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    mmrec("fit", "--help")
    lines = capsys.readouterr().out.split("options:")[1].splitlines()
    bare = [
        a
        for a, b in zip(lines, [*lines[1:], ""], strict=True)
        if re.match(r" *--(model\.|data\.|run)\S* \S+$", a) and b.strip().startswith("(type")
    ]
    assert bare == []


def test_print_config_can_be_used_again(
    mmrec: Command, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=1"), "--print_config") == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert mmrec("fit", "--config=mine.yaml", "--run=a") == 0
    printed, kept = (yaml.safe_load(Path(path).read_text()) for path in ("mine.yaml", "lightning_logs/a/config.yaml"))
    assert {name: kept[name] for name in ("model", "data", "early_stopping")} == {
        name: printed[name] for name in ("model", "data", "early_stopping")
    }
    assert last("a")["epoch"] == 0


def test_ctrl_c_while_python_ends_leaves_no_traceback(tmp_path: Path) -> None:
    program = (
        "import atexit, os, signal, sys; from mmrec import cli; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); sys.argv = ['mmrec', '--version']; cli.run()"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.stdout.startswith("mmrec ")
    assert ended.returncode == -signal.SIGINT
