"""The commands of training on a simulated CUDA device: see :mod:`phantom`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import assert_same_training, fit, last
from phantom import cuda

pytestmark = pytest.mark.simulated_cuda

GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]


def test_it_keeps_the_rules_of_a_device() -> None:
    on_device = torch.arange(3.0, device="cuda")
    assert on_device.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="same device"):
        on_device + torch.ones(3)
    with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
        on_device.numpy()
    with cuda.counted() as counts:
        assert (2 * on_device).tolist() == [0, 2, 4]
        assert float(on_device.sum()) == 3
    assert counts.kernels == {"mul": 1, "sum": 1, "_local_scalar_dense": 1}
    assert sorted(name for name, _ in counts.waits) == ["_local_scalar_dense", "copy to host"]


def test_a_resumed_run_ends_with_the_same_bits(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*GPU, "--trainer.max_epochs=-1", "--model.min_lr_ratio=1"]
    assert mmrec(*fit(prepared, *options, "--trainer.max_steps=8", "--run=whole")) == 0
    assert mmrec(*fit(prepared, *options, "--trainer.max_steps=4", "--run=parts")) == 0
    assert mmrec("fit", "--run=parts", "--ckpt_path=last", "--trainer.max_steps=8") == 0
    assert_same_training(last("whole"), last("parts"))
    for how in ([], ["--window=64"], ["--learn"]):
        assert mmrec("validate", "--run=whole", "--ckpt_path=last", *how) == 0
    assert capsys.readouterr().out.count("nats/token") == 3
