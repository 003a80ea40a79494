"""A training that was stopped, by itself or by a signal, and is gone on with."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import assert_same_training, checkpoints, fit, last, load
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import OUTPUT, interrupt, start, wait

from mmrec.checkpoints.loading import load_model
from mmrec.training.compat import leave_out_sigterm_broadcast

EPOCH_OF_9 = "--data.seq_len=640"
"""An epoch of nine batches: three segments of three."""


@pytest.mark.parametrize("every", [{"--last.every_n_train_steps": 4}, {"--trainer.accumulate_grad_batches": 2}])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    mmrec: Command, prepared: Path, every: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"{name}={value}" for name, value in every.items()]
    whole = [*options, EPOCH_OF_9, "--trainer.max_epochs=2", "--model.config.layer_types=[short, long]"]
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
    later = {10: 11, 12: 13} if "--trainer.accumulate_grad_batches" in every else {}
    for stop in (2, 9, 10, 12):
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
    command = [EPOCH_OF_9, "--trainer.max_epochs=3", "--trainer.logger=false", "--trainer.val_check_interval=3"]
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
        for number, batches in enumerate((9, 1, 1, 1, 6, 2)):
            left = batches
            again = ["fit", "--run=parts", "--ckpt_path=last"]
            assert mmrec(*(again if number else fit(prepared, *command, "--run=parts"))) == 130
    assert mmrec(*again) == 0
    assert_same_training(last("whole"), last("parts"))


def test_a_run_that_was_stopped_after_its_last_update_is_validated(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--trainer.max_epochs=-1", "--trainer.max_steps=4", "--trainer.logger=false"]
    every = ["--trainer.val_check_interval=3", "--trainer.limit_val_batches=1"]
    assert mmrec(*fit(prepared, *command, *every, "--run=whole")) == 0

    from mmrec.training.callbacks.checkpointing import LastCheckpoint

    before = LastCheckpoint.on_train_batch_end

    def interrupt(self: LastCheckpoint, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        before(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", interrupt)
        assert mmrec(*fit(prepared, *command, *every, "--run=parts")) == 130
    for _ in range(2):  # the second time all is done
        assert mmrec("fit", "--run=parts", "--ckpt_path=last") == 0
        assert_same_training(last("whole"), last("parts"))
        assert load(checkpoints("parts") / "best.ckpt")["global_step"] == 4


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
    process = start(tmp_path, fit(prepared, "--trainer.max_epochs=1000", "--run=a"))
    wanted = tmp_path / "lightning_logs" / "a" / "checkpoints" / "last.ckpt"
    while not wanted.exists() and process.is_alive():
        process.join(0.05)
    interrupt([process], number)
    found = wait([process])
    errors = (tmp_path / OUTPUT).read_text()
    assert found == status, errors
    assert "mmrec fit --run a --ckpt_path last" in errors
    assert "Traceback" not in errors
    assert load_model(wanted).step > 0


def test_processes_agree_on_a_signal_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning sends at every batch whether the first process was sent SIGTERM, which StopOnSignal handles."""
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    monkeypatch.setattr(Trainer, "received_sigterm", True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *given, **options: None)
    with pytest.raises(SIGTERMException):
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    leave_out_sigterm_broadcast(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
