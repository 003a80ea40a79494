"""Two processes learn what one does from the same batches, with the model replicated or sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit, last
from processes import run

from mmrec.checkpoints.loading import load_model

pytestmark = pytest.mark.slow

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP = ["--trainer.devices=2", "--trainer.strategy=sharded"]
LOSSES = ["--model.mtp_loss_weight=0.5", "--model.confidence_penalty=0.3"]
EXACT = ["--trainer.precision=64-true", "--model.dropout=0", "--trainer.max_epochs=-1", "--trainer.max_steps=20"]


def trained(run: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint of ``run``, put together where it is in shards."""
    return load_model(folder / "lightning_logs" / run / "checkpoints" / "last.ckpt").net.state_dict()


@pytest.mark.parametrize(
    ("optimizer", "options", "ways"),
    [
        ("muon", ["--model.config.count_half_lives=[20,300]"], {"ddp": DDP, "sharded": FSDP}),
        ("adamw", ["--trainer.gradient_clip_val=1.0", *LOSSES], {"ddp": DDP, "sharded": FSDP}),
    ],
    ids=["muon", "adamw"],
)
def test_two_processes_learn_what_one_does(
    mmrec: Command, prepared: Path, tmp_path: Path, optimizer: str, options: list[str], ways: dict[str, list[str]]
) -> None:
    options = [*EXACT, f"--model.optimizer={optimizer}", *options]
    assert mmrec(*fit(prepared, *options, "--data.batch_size=4", "--run=one")) == 0
    one = trained("one", tmp_path)
    for way, strategy in ways.items():
        said = run(tmp_path, *fit(prepared, *options, "--data.batch_size=2", *strategy, f"--run={way}"), ranks=2)
        assert "Warning" not in said
        two = trained(way, tmp_path)
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    # Each row of the memory is that of the same text: rows of two processes were never mixed.
    for mine, theirs in zip(
        *(last(name, tmp_path)["mmrec_progress"]["carried"][0] for name in ("one", "ddp")), strict=True
    ):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradients_through_shared_memory_are_those_of_ddp(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    options = ["--trainer.precision=32-true", *LOSSES, "--trainer.accumulate_grad_batches=2"]
    options += ["--trainer.max_epochs=-1", "--trainer.max_steps=4"]
    ways = {"ddp": [*DDP, "--data.batch_size=2"]}
    ways["cores"] = ["--trainer.devices=2", "--trainer.strategy=cores", "--data.batch_size=4"]
    for way, strategy in ways.items():
        run(tmp_path, *fit(prepared, *options, *strategy, f"--run={way}"), ranks=2)
    ddp, cores = (trained(way, tmp_path) for way in ways)
    assert all(torch.equal(ddp[name], cores[name]) for name in ddp)


def test_a_model_cut_over_processes_goes_on(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    """FSDP: each process keeps a part of every weight, and writes its own part of the checkpoint."""
    options = [*EXACT[1:3], "--trainer.precision=32-true", "--model.optimizer=adamw"]
    # A rate that does not depend on how many updates are planned.
    options += ["--data.batch_size=2", "--model.min_lr_ratio=1.0", *FSDP]
    # Validations on the way: what the first process shows of them must not wait for the others.
    validated = ["--trainer.val_check_interval=10", "--trainer.limit_val_batches=2"]
    run(tmp_path, *fit(prepared, *options, *validated, "--trainer.max_steps=20", "--run=whole"), ranks=2)
    run(tmp_path, *fit(prepared, *options, "--trainer.max_steps=12", "--run=parts"), ranks=2)
    folder = tmp_path / "lightning_logs" / "parts" / "checkpoints"
    assert len(list((folder / "last.ckpt").glob("*.distcp"))) == 2
    run(tmp_path, "fit", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=20", ranks=2)
    ends = [
        load_model(tmp_path / "lightning_logs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts")
    ]
    assert [end.step for end in ends] == [20, 20]
    whole, parts = (end.net.state_dict() for end in ends)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert mmrec("generate", "--run=whole", "--ckpt=last", "--length=5", "--prompt=to be") == 0
    # Both processes read all of the validation text, and one of them says what came of it.
    assert run(tmp_path, "validate", "--run=whole", "--ckpt_path=last", ranks=2).count("validation (carried") == 1
    assert run(tmp_path, "predict", "--run=whole", "--ckpt_path=last", ranks=2).count("predictions.tsv") == 1


def test_averages_of_weights_need_a_model_that_is_whole(prepared: Path, tmp_path: Path) -> None:
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--run=a"]
    said = run(tmp_path, *fit(prepared, *FSDP, *average), ranks=2, status=2)
    assert "leave it out by --trainer.callbacks null" in said
    assert "Traceback" not in said
    assert not (tmp_path / "lightning_logs" / "a").exists()
