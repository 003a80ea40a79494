"""Bad input: one line, status 2, nothing changed; and a training whose numbers go bad."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command, Figure
from helpers import fit, last, losses
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from mmrec.core.errors import UserError
from mmrec.data.batches import Batch
from mmrec.training.compat import refuse_too_many_processes
from mmrec.training.module import RecurrentLMModule

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
    "more processes than cores": (
        [
            "fit",
            "--config=corpus/sample",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={(os.cpu_count() or 1) + 2}",
        ],
        "starts as many processes on the",
    ),
    "wrong devices": (
        ["fit", "--config=corpus/sample", "--trainer.accelerator=cpu", "--trainer.devices=x"],
        "int > 0",
    ),
    "no validation": (["fit", "--config=corpus/sample", "--trainer.val_check_interval=0"], "val_check_interval is 0"),
    "validation too late": (["fit", "--config=corpus/sample", "--trainer.val_check_interval=9999"], "an epoch has"),
    "wrong top_p": (["generate", "--top_p=0"], "top_p is 0"),
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
    cases: list[tuple[Sequence[object], str]] = [
        (
            ["validate", "--ckpt_path=last", "--model.config.dim=32", quiet],
            "another architecture: dim 16 there, 32 here",
        ),
        (["validate", "--ckpt_path=last", "--data.data_dir=other", quiet], "another tokenizer"),
        (["fit", "--ckpt_path=last", "--model.config.layers=3", quiet], "layers 2 there, 3 here"),
        (["fit", "--ckpt_path=last", "--model.optimizer=adamw", quiet], "the checkpoint was trained by muon"),
        (fit(prepared, "--run=a"), "already exists"),
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
    assert "too few for 2 rows of sequences of 100000" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("devices", "external", "refused"), [(99, False, True), (3, False, True), (2, False, False), (99, True, False)]
)
def test_processes_on_cpus(devices: int, external: bool, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is started here; those that torchrun or Slurm has started are there already."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    environment = SimpleNamespace(creates_processes_externally=external)
    strategy = SimpleNamespace(cluster_environment=environment)
    trainer: Any = SimpleNamespace(strategy=strategy, accelerator=CPUAccelerator(), num_devices=devices)
    if refused:
        with pytest.raises(UserError, match="on the 2 CPU cores of this machine; give at most 2"):
            refuse_too_many_processes(trainer)
    else:
        refuse_too_many_processes(trainer)
