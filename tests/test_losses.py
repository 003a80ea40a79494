"""The confidence penalty: its value, that it is minimized, and that no logged loss counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import BATCH, checkpoints, fit, last, losses
from torch.distributions import Categorical

from mmrec.checkpoints.loading import load_model
from mmrec.data.batches import IGNORE_INDEX, SegmentSampler
from mmrec.data.store import open_tokens
from mmrec.inference.metrics import token_nll
from mmrec.model import Hidden, ModelConfig, RecurrentLM, reset_state_rows
from mmrec.model.ops import dispatch
from mmrec.training import losses as training_losses
from mmrec.training.losses import confidence, confidence_weight, nll_in_parts, summed_losses


@pytest.mark.skipif(not dispatch.choose_native(), reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "scale"), [(1, 1.0), (65, 3.0), (300, 30.0), (17, 300.0)])
def test_compiled_losses_are_those_of_torch(dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    logits = (scale * torch.randn(3, 7, vocab_size)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (3, 7))
    targets[1, 2:5] = IGNORE_INDEX
    kernels = dispatch.native_losses(logits)
    assert kernels is not None
    exact = logits.detach().double().requires_grad_()
    for weights in [(1.0, 0.0), (0.7, 0.3), (0.0, -2.0)]:
        sums = [kernels.token_losses(logits, targets), (token_nll(exact, targets, "sum"), confidence(exact, targets))]
        for found, expected in zip(*sums, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        grads = [
            torch.autograd.grad(weights[0] * nll + weights[1] * confident, of)[0].double()
            for (nll, confident), of in zip(sums, (logits, exact), strict=True)
        ]
        precision = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(grads[0], grads[1], rtol=precision, atol=precision)
        assert not grads[0][1, 2:5].any()


@pytest.mark.skipif(not dispatch.choose_native(), reason="no C compiler")
def test_compiled_losses_pass_on_what_is_no_number_and_refuse_what_is_no_token() -> None:
    logits, targets = torch.randn(1, 3, 5), torch.tensor([[1, 2, 4]])
    kernels = dispatch.native_losses(logits)
    assert kernels is not None
    for wrong in (float("nan"), float("inf"), float("-inf")):
        broken = logits.clone()
        broken[0, 1, 2] = wrong
        assert not kernels.token_losses(broken, targets)[0].isfinite()
    large = torch.tensor([[[1e7, 1e7, 0.0]]], requires_grad=True)  # where a float has no room for the logarithm of 2
    nll, _ = kernels.token_losses(large, targets[:, :1])
    nll.backward()
    assert large.grad is not None
    torch.testing.assert_close(large.grad, torch.tensor([[[0.5, -0.5, 0.0]]]))
    with pytest.raises(IndexError, match="target 5 is none of the 5 tokens"):
        kernels.token_losses(logits, targets + 1)


def test_confidence_is_minus_the_entropy_of_the_scored_places() -> None:
    logits = 3 * torch.randn(2, 3, 5)
    targets = torch.tensor([[1, 2, IGNORE_INDEX], [4, IGNORE_INDEX, 0]])
    entropy = Categorical(logits=logits).entropy()
    torch.testing.assert_close(confidence(logits, targets), -entropy[targets != IGNORE_INDEX].sum())
    assert confidence(logits.bfloat16(), targets).dtype == torch.float32
    sure = torch.tensor([[[200.0, -200.0]]])
    assert float(confidence(sure, targets[:1, :1])) == 0.0


@pytest.mark.parametrize("penalized", [False, True])
def test_few_logits_at_a_time_give_the_same_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, penalized: bool
) -> None:
    rows, length, width, vocab_size = 3, 7, 8, 50
    net = RecurrentLM(ModelConfig(dim=width, layers=1, heads=1, ffn_dim=8), vocab_size).double()
    hidden = torch.randn(rows, length, width, dtype=torch.double, requires_grad=True)
    targets = torch.randint(vocab_size, (rows, length))
    targets[1, :4] = IGNORE_INDEX

    def measured() -> tuple[list[torch.Tensor], int]:
        kept: list[int] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            nll, confident = summed_losses(net, Hidden(hidden), targets, penalized)
        gradients = torch.autograd.grad(nll + 0.3 * confident, [hidden, net.head.weight])
        return [nll, confident, *gradients, nll_in_parts(net, Hidden(hidden), targets)], max(kept)

    expected, most = measured()
    assert most >= targets.numel() * vocab_size
    monkeypatch.setattr(training_losses, "MOST_LOGITS", 4 * vocab_size + 3)
    found, most = measured()
    torch.testing.assert_close(found, expected)
    assert bool(expected[1]) == penalized
    assert most <= max(hidden.numel(), net.head.weight.numel())


def test_its_weight_rises_to_the_end_of_the_plan() -> None:
    assert [confidence_weight(0.4, step, 4) for step in (0, 1, 4, 9)] == [0, pytest.approx(0.1), 0.4, 0.4]
    assert confidence_weight(0.4, 0, None) == 0.4


def test_it_is_learned_from_and_not_shown(mmrec: Command, prepared: Path) -> None:
    # No rate, and an average of gradients that keeps the last alone: the optimizer's state tells it.
    still = ["--model.learning_rate=0", "--model.dropout=0", "--model.optimizer=adamw", "--model.beta1=0"]
    still += ["--trainer.gradient_clip_val=1e9", "--trainer.precision=32-true", "--data.interleave=1"]
    still += ["--trainer.max_epochs=-1", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
    for run, penalty in (("with", "0.8"), ("without", "0")):
        assert mmrec(*fit(prepared, *still, f"--model.confidence_penalty={penalty}", f"--run={run}")) == 0
    assert len(losses("with")) == 4
    assert losses("with", "train/loss") == losses("without", "train/loss")
    assert losses("with", "val/loss") == losses("without", "val/loss")

    tokens, net = open_tokens(prepared), load_model(checkpoints("with") / "last.ckpt").net
    stream, state = SegmentSampler(tokens.train, *BATCH), net.zero_state(BATCH[0])
    for number in range(4):
        batch = stream.batch(number)
        with torch.set_grad_enabled(number == 3):
            logits, state = net(batch.inputs, reset_state_rows(state, batch.reset_mask))
    count = (batch.targets != IGNORE_INDEX).sum()
    loss = (token_nll(logits, batch.targets, "sum") + 0.8 * 3 / 4 * confidence(logits, batch.targets)) / count
    (expected,) = torch.autograd.grad(loss, net.embedding.weight)

    def kept(run: str) -> torch.Tensor:
        states: Any = last(run)["optimizer_states"][0]["state"].values()
        gradient: torch.Tensor
        (gradient,) = (s["exp_avg"] for s in states if s["exp_avg"].shape == expected.shape)
        return gradient

    torch.testing.assert_close(kept("with"), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(kept("without"), expected, rtol=1e-2)
