"""The commands, as a user types them: what they do, what they leave, and what they say to bad input."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Command, Figure
from helpers import assert_same_training, fit, last, losses
from lightning.pytorch.accelerators import CUDAAccelerator

from mmrec.checkpoints.checkpoint import load_model
from mmrec.data.batches import Batch
from mmrec.training.module import RecurrentLMModule

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

    assert mmrec("generate", "--prompt", "to be", "--length", "50", "--seed", "3") == 0
    written = capsys.readouterr().out
    assert written.startswith("to be")
    assert len(written) == len("to be") + 50 + 1
    mmrec("generate", "--prompt", "to be", "--length", "50", "--seed", "3")
    assert capsys.readouterr().out == written


def test_the_board_shows_what_it_should(mmrec: Command, prepared: Path) -> None:
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
    assert mmrec(*fit(prepared, *never_better, "--run=a")) == 0
    assert last("a")["epoch"] == 2


def test_another_corpus_with_bpe_and_adamw(mmrec: Command, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"{i} {text[i * 1500 : (i + 2) * 1500]}")
    assert (
        mmrec("prepare", "--input_dir", folder, "--output_dir", "d", "--tokenizer", "bpe", "--vocab_size", 300) == 0
    )
    assert mmrec(*fit(Path("d"), "--model.optimizer=adamw", "--trainer.max_epochs=1", "--run=a")) == 0
    assert mmrec("generate", "--ckpt", "last", "--prompt", "que", "--length", 5) == 0


# Going on


@pytest.mark.parametrize("every", [{"--last.every_n_train_steps": 5}, {"--trainer.accumulate_grad_batches": 2}])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    mmrec: Command, prepared: Path, every: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"{name}={value}" for name, value in every.items()]
    whole = [*options, "--trainer.max_epochs=2", "--model.config.layer_types=[short, long]"]
    assert mmrec(*fit(prepared, *whole, "--run=whole")) == 0

    from mmrec.training.callbacks.checkpointing import LastCheckpoint

    batches = stop = 0
    before = LastCheckpoint.on_train_batch_end

    def interrupt(self: LastCheckpoint, *args: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == stop:
            os.kill(os.getpid(), signal.SIGINT)
        before(self, *args)

    # With gradients of two batches an update, it stops after the second.
    later = {22: 23, 26: 27} if "--trainer.accumulate_grad_batches" in every else {}
    for stop in (4, 21, 22, 26):
        batches, run = 0, f"stopped_at_{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(LastCheckpoint, "on_train_batch_end", interrupt)
            assert mmrec(*fit(prepared, *whole, f"--run={run}")) == 130
        assert batches == later.get(stop, stop)
        assert mmrec("fit", "--run", run, "--ckpt_path", "last") == 0
        assert_same_training(last("whole"), last(run))


def test_a_run_that_was_stopped_again_and_again(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an epoch, and soon after: there Lightning loses count of the epochs."""
    command = ["--trainer.max_epochs=3", "--trainer.logger=false", "--trainer.val_check_interval=7"]
    assert mmrec(*fit(prepared, *command, "--run=whole")) == 0

    from mmrec.training.callbacks.checkpointing import LastCheckpoint

    left, before = 0, LastCheckpoint.on_train_batch_end

    def interrupt(self: LastCheckpoint, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        before(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", interrupt)
        for number, batches in enumerate((21, 1, 1, 5, 14, 2)):
            left = batches
            again = ["fit", "--run=parts", "--ckpt_path=last"]
            assert mmrec(*(again if number else fit(prepared, *command, "--run=parts"))) == 130
    assert mmrec(*again) == 0
    assert_same_training(last("whole"), last("parts"))


def test_more_steps_go_on_where_max_steps_broke_off(mmrec: Command, prepared: Path) -> None:
    schedule = ["--model.warmup_steps=0", "--model.min_lr_ratio=1"]  # whose length does not depend on max_steps
    for run, steps in (("whole", 27), ("parts", 9)):
        assert (
            mmrec(
                *fit(prepared, *schedule, "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", f"--run={run}")
            )
            == 0
        )
    assert mmrec("fit", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=27") == 0
    assert_same_training(last("whole"), last("parts"))


def test_what_is_asked_for_on_resuming_is_in_force(
    mmrec: Command, prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a", "--model.min_lr_ratio=1"))
    again = ["--trainer.max_epochs=2", "--model.learning_rate=0.0125", "--early_stopping.patience=9"]
    assert mmrec("fit", "--run=a", "--ckpt_path=last", *again, "--model.beta1=0.5", "--model.weight_decay=0") == 0
    assert "learning_rate 0.003 -> 0.0125" in caplog.text
    assert "beta1 0.9 -> 0.5" in caplog.text

    def groups() -> list[dict[str, Any]]:
        return [g for member in last("a")["optimizer_states"][0]["members"] for g in member["param_groups"]]

    assert {group["lr"] for group in groups()} == {0.0125}
    assert [group.get("betas") for group in groups()] == [None, (0.5, 0.99), (0.5, 0.99)]
    assert {group["weight_decay"] for group in groups()} == {0}
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_epochs=3", "--model.weight_decay=0.3") == 0
    assert [group["weight_decay"] for group in groups()] == [0.3, 0.3, 0]
    assert [s["patience"] for s in last("a")["callbacks"].values() if "patience" in s] == [9]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_saves_and_says_how_to_go_on(
    prepared: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-m", "mmrec", *fit(prepared, "--trainer.max_epochs=1000", "--run=a")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wanted = tmp_path / "lightning_logs" / "a" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "mmrec fit --run a --ckpt_path last" in errors
    assert "Traceback" not in errors
    assert load_model(wanted).step > 0


@pytest.mark.slow
def test_a_pipe_that_closes_and_ctrl_c_end_quietly(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a")) == 0
    command = [sys.executable, "-m", "mmrec", "generate", "--length=10000000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for stop, status, says in (("close", 141, ""), ("interrupt", 130, "mmrec: stopped by Ctrl-C")):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:  # type: ignore[call-overload]
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


# Bad input: one line, status 2, nothing changed

BAD = {
    "unknown command": (["fitt"], "did you mean 'fit'"),
    "unknown option": (["fit", "--data.bach_size=4"], "did you mean 'data.batch_size'"),
    "unknown config": (["fit", "--config", "tiney"], "did you mean 'tiny'"),
    "wrong type": (["fit", "--model.learning_rate=fast"], "model.learning_rate"),
    "wrong value": (["fit", "--model.dropout=2", "--config=corpus/sample"], "model.dropout is 2"),
    "wrong share": (["fit", "--model.min_lr_ratio=-1", "--config=corpus/sample"], "min_lr_ratio is -1"),
    "wrong shape": (["fit", "--model.config.dim=30", "--model.config.heads=4", "--config=corpus/sample"], "multiple"),
    "wrong optimizer": (["fit", "--model.optimizer=sgd"], "model.optimizer"),
    "no run to resume": (["fit", "--ckpt_path=last"], "no run with a checkpoint in lightning_logs"),
    "no run of that name": (["fit", "--ckpt_path=last", "--run=x"], "no checkpoint of a run 'x'"),
    "no such checkpoint": (["validate", "--ckpt_path=x.ckpt"], "no such checkpoint"),
    "no checkpoint named": (["validate"], "give --ckpt_path best"),
    "unknown corpus": (["prepare", "sampel"], "did you mean 'sample'"),
    "no corpus": (["prepare"], "name a corpus"),
    "missing file": (["prepare", "--input_file=x"], "x: no such file"),
    "no data": (["fit", "--data.corpus=file"], "needs --input_file"),
    "no such data": (["fit", "--config=tiny", "--data.data_dir=x"], "x: no such folder"),
    "nothing to generate with": (["generate"], "no run with a checkpoint"),
    "no such accelerator": (["fit", "--config=corpus/sample", "--trainer.accelerator=abacus"], "'abacus'"),
    "wrong devices": (
        ["fit", "--config=corpus/sample", "--trainer.accelerator=cpu", "--trainer.devices=x"],
        "int > 0",
    ),
    "no validation": (["fit", "--config=corpus/sample", "--trainer.val_check_interval=0"], "val_check_interval is 0"),
    "validation too late": (["fit", "--config=corpus/sample", "--trainer.val_check_interval=9999"], "an epoch has"),
    "wrong top_p": (["generate", "--top_p=0"], "--top_p is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, says = BAD[case]
    assert mmrec(*args) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("mmrec: error: ")
    assert error.count("\n") == 1
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"data"}  # the sample corpus, prepared before the model was found wrong


@pytest.mark.parametrize("config", ["gpu", "ddp", "fsdp"])
def test_without_a_gpu(
    config: str, mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    assert mmrec("fit", f"--config=trainer/{config}", f"--data.data_dir={prepared}") == 2
    error = capsys.readouterr().err
    assert "without a GPU leave trainer/gpu" in error
    assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()


def test_bad_checkpoints(mmrec: Command, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    kept = [*Path("lightning_logs/a/checkpoints").iterdir(), Path("lightning_logs/a/config.yaml")]
    before = {p: p.read_bytes() for p in kept}
    (tmp_path / "words.txt").write_text("other words with another alphabet\n" * 400)
    mmrec("prepare", "--input_file=words.txt", "--output_dir=other", "--tokenizer=characters")
    (tmp_path / "notes.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    good = Path("lightning_logs/a/checkpoints/last.ckpt")
    (tmp_path / "half.ckpt").write_bytes(good.read_bytes()[:5000])
    quiet = "--trainer.enable_progress_bar=false"
    cases: list[tuple[list[object], str]] = [
        (
            ["validate", "--ckpt_path=last", "--model.config.dim=32", quiet],
            "another architecture: dim 16 there, 32 here",
        ),
        (["validate", "--ckpt_path=last", "--data.data_dir=other", quiet], "another tokenizer"),
        (["fit", "--ckpt_path=last", "--model.config.layers=3", quiet], "layers 2 there, 3 here"),
        (["fit", "--ckpt_path=last", "--model.optimizer=adamw", quiet], "the checkpoint was trained by muon"),
        (fit(prepared, "--run=a"), "is there already"),
        (["validate", "--ckpt_path=notes.ckpt"], "not a readable checkpoint"),
        (["validate", "--ckpt_path=half.ckpt"], "not a readable checkpoint"),
        (["generate", "--ckpt=foreign.ckpt"], "is not a checkpoint of mmrec"),
        (["validate", "--run=b", "--ckpt_path=best"], "no checkpoint of a run 'b'"),
        (["generate", "--prompt=\u00c4"], "is not in the alphabet"),
    ]
    for args, says in cases:
        capsys.readouterr()
        assert mmrec(*args) == 2, args
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("mmrec: error: ")
        assert says in error
    assert {p: p.read_bytes() for p in kept} == before


def test_too_short_a_text_for_one_sequence(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--data.seq_len=100000")) == 2
    assert "too few for 4 rows of sequences of 100000" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    checkpoint = last("a")
    checkpoint["state_dict"]["net.blocks.0.ffn.output.weight"][0, 0] = float("nan")
    torch.save(checkpoint, "bad.ckpt")
    again = ["--ckpt_path=bad.ckpt", "--trainer.max_epochs=3", "--run=b"]
    assert mmrec(*fit(prepared, *again)) == 2
    assert "gradient is not finite at step" in capsys.readouterr().err
    assert not Path("lightning_logs/b/checkpoints/last.ckpt").exists()


@pytest.mark.reliability
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_may_be_left_out(
    mmrec: Command,
    prepared: Path,
    bad: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    figure: Figure,
) -> None:
    step = RecurrentLMModule.training_step

    def spoiled(self: RecurrentLMModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        return step(self, batch, batch_idx) * (bad if batch_idx in (5, 6, 12) else 1)

    with monkeypatch.context() as patch:
        patch.setattr(RecurrentLMModule, "training_step", spoiled)
        assert mmrec(*fit(prepared, "--run=stops", "--trainer.max_epochs=1", "--last.every_n_train_steps=1")) == 2
        assert last("stops")["global_step"] == 5
        skip = ["--gradients.if_not_finite=skip", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
        assert mmrec(*fit(prepared, "--run=skips", *skip)) == 0
    for run in ("stops", "skips"):
        assert all(value.isfinite().all() for value in last(run)["state_dict"].values())
        carried = last(run)["mmrec_progress"]["carried"][0]
        assert all(part.isfinite().all() for layer in carried for part in layer)
    assert caplog.text.count("update left out") == 3
    assert losses("skips", "train/skipped_updates")[20] == 3
    figure("NaN and infinity: stop before the update, or leave it out and count it", "last stays finite")


# Help


def test_help_names_every_command(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("prepare", "fit", "validate", "test", "predict", "generate"))
    for command in ("prepare", "generate", "fit"):
        assert mmrec(command, "--help") == 0
        assert "--" in capsys.readouterr().out
    assert mmrec("--version") == 0


def test_every_option_of_ours_is_explained(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    mmrec("fit", "--help")
    lines = capsys.readouterr().out.split("options:")[1].splitlines()
    bare = [
        a
        for a, b in zip(lines, [*lines[1:], ""], strict=True)
        if a.strip().startswith(("--model.", "--data.", "--run")) and b.strip().startswith("(type")
    ]
    assert bare == []


def test_print_config_can_be_used_again(
    mmrec: Command, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=1"), "--print_config") == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert mmrec("fit", "--config=mine.yaml", "--run=a") == 0
