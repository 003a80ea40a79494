"""Two processes, each with a simulated CUDA device of its own: see :mod:`phantom`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import assert_same_training, fit, last

from mmrec.checkpoints.loading import load_model

pytestmark = pytest.mark.slow

GPUS = ["--trainer.accelerator=gpu", "--trainer.devices=2", "--trainer.precision=32-true"]
ENDLESS = ["--trainer.max_epochs=-1", "--model.min_lr_ratio=1"]
VALIDATED = ["--trainer.val_check_interval=3", "--trainer.limit_val_batches=2"]


def test_ddp_resumes_on_two_devices_on_one_and_on_the_cpu(
    run_on_devices: Callable[..., str], mmrec: Command, prepared: Path, tmp_path: Path
) -> None:
    options = [*ENDLESS, *VALIDATED, *GPUS, "--trainer.strategy=ddp"]
    run_on_devices(tmp_path, *fit(prepared, *options, "--trainer.max_steps=8", "--run=whole"), ranks=2)
    run_on_devices(tmp_path, *fit(prepared, *options, "--trainer.max_steps=4", "--run=parts"), ranks=2)
    half = tmp_path / "lightning_logs/parts/checkpoints/last.ckpt"
    # By one device, with as many rows, and by a machine without any.
    alone = ["--trainer.max_steps=8", "--trainer.devices=1", "--trainer.strategy=auto", "--data.batch_size=4"]
    run_on_devices(tmp_path, "fit", f"--ckpt_path={half}", "--run=one", *alone)
    assert mmrec("fit", f"--ckpt_path={half}", "--run=none", *alone, "--trainer.accelerator=cpu") == 0
    run_on_devices(tmp_path, "fit", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=8", ranks=2)
    end = last("whole", tmp_path)
    assert_same_training(end, last("parts", tmp_path))
    masks = end["mmrec_progress"]["random"]
    assert not torch.equal(masks[0]["cuda"], masks[1]["cuda"])  # what dropout leaves out differs by rank
    for run in ("one", "none"):
        resumed = last(run, tmp_path)
        assert resumed["global_step"] == 8
        for mine, theirs in zip(
            resumed["mmrec_progress"]["carried"][0], end["mmrec_progress"]["carried"][0], strict=True
        ):
            assert [part.shape for part in mine] == [part.shape for part in theirs]


def test_fsdp_resumes_on_two_devices(
    run_on_devices: Callable[..., str], mmrec: Command, prepared: Path, tmp_path: Path
) -> None:
    options = [*ENDLESS, *VALIDATED, *GPUS, "--trainer.strategy=sharded"]  # Muon, and AdamW for what is no matrix
    run_on_devices(tmp_path, *fit(prepared, *options, "--trainer.max_steps=6", "--run=whole"), ranks=2)
    run_on_devices(tmp_path, *fit(prepared, *options, "--trainer.max_steps=3", "--run=parts"), ranks=2)
    resumed = ["--run=parts", "--ckpt_path=last", "--trainer.max_steps=6", "--model.activation_checkpointing=true"]
    run_on_devices(tmp_path, "fit", *resumed, ranks=2)  # which computes more, and changes no bit
    whole, parts = (
        load_model(tmp_path / "lightning_logs" / run / "checkpoints/last.ckpt").net.state_dict()
        for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert mmrec("generate", "--run=whole", "--ckpt=last", "--length=5", "--prompt=to be") == 0
