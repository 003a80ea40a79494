"""The commands of training on a simulated CUDA device: see :mod:`phantom`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from conftest import Command
from helpers import assert_same_training, fit, last, losses
from lightning.pytorch import Callback, LightningModule, Trainer
from phantom import cuda
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.ops import chunked, reference
from mmrec.training.cli import TrainingCLI
from mmrec.training.compat import _AverageUpdate
from mmrec.training.optim import make_optimizer
from mmrec.training.options import OptimizerOptions

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
    with cuda.counted() as counts:
        torch.ones(3).to("cuda", non_blocking=True)
        torch.ones(3).to("cuda")
    assert [name for name, _ in counts.waits.elements()] == ["blocking copy to device"]


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


class _CountedUpdates(Callback):
    """Counts what is done on the device from the start of one update to that of another."""

    FIRST, LAST = 3, 7

    def __init__(self) -> None:
        self.counts = cuda.Counts()
        self._stack = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.FIRST:
            self.counts = self._stack.enter_context(cuda.counted())
        elif trainer.global_step == self.LAST:
            self._stack.close()


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> _CountedUpdates:
    """Counts the updates of the next training."""
    counter = _CountedUpdates()
    instantiate = TrainingCLI.instantiate_trainer

    def with_counter(self: TrainingCLI, **kwargs: Any) -> Trainer:
        trainer = instantiate(self, **kwargs)
        trainer.callbacks.insert(0, counter)  # type: ignore[attr-defined]
        return trainer

    monkeypatch.setattr(TrainingCLI, "instantiate_trainer", with_counter)
    return counter


def test_an_update_waits_once_for_the_device(mmrec: Command, prepared: Path, updates: _CountedUpdates) -> None:
    everything = ["--trainer.enable_progress_bar=true", "--trainer.callbacks+=EMAWeightAveraging"]
    everything += ["--model.mtp_loss_weight=0.3", "--model.confidence_penalty=0.1", "--gradients.if_not_finite=skip"]
    assert mmrec(*fit(prepared, *GPU, *everything, "--trainer.max_steps=8")) == 0
    waits = updates.counts.waits
    assert sum(waits.values()) == updates.LAST - updates.FIRST, waits
    ((_, line),) = waits
    assert line.startswith("mmrec/training/callbacks/gradients.py:")


def test_the_rate_is_measured_when_the_device_has_done_its_work(
    mmrec: Command, prepared: Path, updates: _CountedUpdates
) -> None:
    assert mmrec(*fit(prepared, *GPU, "--trainer.log_every_n_steps=2", "--trainer.max_steps=8")) == 0
    lines = [line for name, line in updates.counts.waits.elements() if name == "synchronize"]
    assert len(lines) == 2
    assert all(line.startswith("mmrec/training/callbacks/throughput.py:") for line in lines)


def test_validation_is_in_full_precision(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec(*fit(prepared, *GPU, "--trainer.precision=bf16-mixed", "--trainer.max_epochs=1", "--run=a")) == 0
    scores = []
    for accelerator in ("gpu", "cpu"):
        capsys.readouterr()
        assert mmrec("validate", "--run=a", "--ckpt_path=last", f"--trainer.accelerator={accelerator}") == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1]
    logged = losses("a", "val/loss")
    assert f"{list(logged.values())[-1]:.4f} nats/token" in scores[0]


@pytest.mark.parametrize(("has_units", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_one_gpu_trains_in_the_precision_that_it_has_units_for(
    has_units: bool, precision: str, mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supported = lambda including_emulation=True: has_units or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = ["--trainer.accelerator=auto", "--trainer.max_steps=1", "--run=a"]
    assert mmrec(*fit(prepared, *options)) == 0
    config = yaml.safe_load(Path("lightning_logs/a/config.yaml").read_text())["trainer"]
    assert (config["devices"], config["precision"]) == (1, precision)
    assert '"devices": "1 x Simulated"' in Path("lightning_logs/a/history.jsonl").read_text()


def test_a_training_can_be_deterministic(mmrec: Command, prepared: Path) -> None:
    try:
        assert mmrec(*fit(prepared, *GPU, "--trainer.deterministic=true", "--trainer.max_steps=2")) == 0
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("length", "chunk"), [(1, 32), (63, 8), (64, 4), (130, 32)])
def test_the_recurrence_walks_over_the_chunks_in_few_steps(length: int, chunk: int) -> None:
    """The form for a GPU: see ``_entering_states`` in chunked.py."""
    shape = (2, length, 3)
    arguments = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    arguments += [torch.rand(3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    reset = torch.rand(shape[:2]) < 0.05

    def results(op: Callable[..., Any], device: str, *more: int) -> list[torch.Tensor]:
        given = [argument.to(device).requires_grad_() for argument in arguments]
        outputs, state = op(*given, reset.to(device), *more)
        gradients = torch.autograd.grad(outputs.square().sum() + state.sum(), given)
        return [one.detach().cpu() for one in (outputs, state, *gradients)]

    expected = results(reference.rg_lru, "cpu")
    for ours, theirs in zip(results(chunked.rg_lru, "cuda", chunk), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_follows_the_gradient_waits_for_nothing(optimizer: Literal["muon", "adamw"]) -> None:
    """The norm, clipping, the optimizer and the average of the weights can be captured.

    What Muon updates is the same to the bit when it is replayed. AdamW keeps the number of its updates on the host,
    and a replay takes that of the capture.
    """
    torch.manual_seed(0)
    nets = [RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24), 7).to("cuda") for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    options = OptimizerOptions(optimizer)
    optimizers = [make_optimizer(net, options) for net in nets]
    averages = [AveragedModel(net, avg_fn=get_ema_avg_fn(0.9)) for net in nets]
    averaging = [_AverageUpdate(average, get_ema_avg_fn(0.9), True) for average in averages]

    def follow(which: int) -> None:
        gradients = [p.grad for p in nets[which].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(nets[which].parameters(), 1.0, norm)
        optimizers[which].step()
        averaging[which](nets[which])

    def set_gradients(number: int) -> None:
        torch.manual_seed(number)
        for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            gradient = torch.randn(one.shape).to("cuda")
            for parameter in (one, other):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.copy_(gradient)

    set_gradients(0)
    for which in (0, 1):
        follow(which)  # momenta are made
    graph = torch.cuda.CUDAGraph()
    set_gradients(1)
    with torch.no_grad(), torch.cuda.graph(graph):
        follow(1)  # refused, if the host waited
    follow(0)
    set_gradients(2)
    follow(0)
    with cuda.counted() as counts:
        graph.replay()
    assert counts.kernels == {"graph": 1}
    matrices = {id(matrix) for matrix in nets[0].matrices()}
    names = [name for name, parameter in nets[0].named_parameters() if id(parameter) in matrices]
    for one, other in (nets, [average.module for average in averages]):
        same = [torch.equal(one.get_parameter(name), other.get_parameter(name)) for name in names]
        assert same == [optimizer == "muon"] * len(names)
