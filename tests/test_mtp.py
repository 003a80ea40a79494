"""Multi-token prediction: the second token's loss is added in training, fades, and leaves nothing in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import BATCH, checkpoints, fit, last
from torch.nn import functional as F

from mmrec.checkpoints.loading import load_model
from mmrec.data.batches import IGNORE_INDEX, SegmentSampler
from mmrec.data.store import open_tokens
from mmrec.model import reset_state_rows
from mmrec.training.mtp import MTPHead, mtp_targets

SECOND = "--model.mtp_loss_weight=0.5"


def steps(number: int) -> list[str]:
    return ["--trainer.max_epochs=-1", f"--trainer.max_steps={number}", "--trainer.precision=32-true"]


def test_second_targets_end_with_one_that_is_not_scored() -> None:
    targets = torch.tensor([[1, 2, 3], [4, IGNORE_INDEX, IGNORE_INDEX]])
    assert mtp_targets(targets).tolist() == [[2, 3, IGNORE_INDEX], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert mtp_targets(targets[:, :1]).tolist() == [[IGNORE_INDEX], [IGNORE_INDEX]]


def gradient_by_hand(run: str, data: Path, weight: float) -> torch.Tensor:
    """Return the gradient of the embedding at the fourth update of a training whose weights never change."""
    saved = last(run)["state_dict"]
    net = load_model(checkpoints(run) / "last.ckpt").net
    second = MTPHead(net.config.dim)
    second.load_state_dict({k.removeprefix("mtp_head."): v for k, v in saved.items() if k.startswith("mtp_head.")})
    stream, state = SegmentSampler(open_tokens(data).train, *BATCH), net.zero_state(BATCH[0])
    for number in range(4):
        batch = stream.batch(number)
        with torch.set_grad_enabled(number == 3):
            hidden, state = net.hidden(batch.inputs, reset_state_rows(state, batch.reset_mask))
    loss = F.cross_entropy(net.logits(hidden).flatten(0, 1), batch.targets.flatten())
    ahead = net.head(second(hidden.x[:, :-1]))
    loss = loss + weight * F.cross_entropy(ahead.flatten(0, 1), batch.targets[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, net.embedding.weight)
    return gradient


def test_what_is_learned_from_is_both_losses_and_the_second_fades(mmrec: Command, prepared: Path) -> None:
    # No rate, and an average of gradients that keeps the last alone: the optimizer's state tells it.
    still = ["--model.learning_rate=0", "--model.dropout=0", "--model.optimizer=adamw", "--model.beta1=0"]
    still += ["--trainer.gradient_clip_val=1e9", "--data.interleave=1", *steps(4)]
    assert mmrec(*fit(prepared, *still, "--model.mtp_loss_weight=0.8", "--run=a")) == 0
    vocab_size = open_tokens(prepared).tokenizer.vocab_size
    states: Any = last("a")["optimizer_states"][0]["state"].values()
    (kept,) = (state["exp_avg"] for state in states if state["exp_avg"].shape == (vocab_size, 16))
    torch.testing.assert_close(kept, gradient_by_hand("a", prepared, 0.8 * (1 - 3 / 4)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(kept, gradient_by_hand("a", prepared, 0.8), rtol=1e-2)


def test_a_row_of_one_token_has_no_second(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, SECOND, *steps(2), "--data.seq_len=1", "--run=a")) == 0
    assert all(bool(weight.isfinite().all()) for weight in last("a")["state_dict"].values())


def test_the_model_is_the_same_with_and_without(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, SECOND, *steps(3), "--run=a")) == 0
    file = checkpoints("a") / "last.ckpt"
    names = load_model(file).net.state_dict().keys()
    assert {name for name in last("a")["state_dict"] if not name.startswith("mtp_head.")} == {
        f"net.{n}" for n in names
    }
    data = f"--data.data_dir={prepared}"
    for options in ([], ["--model.mtp_loss_weight=0.1"]):
        assert mmrec("validate", data, f"--ckpt_path={file}", *options) == 0
    for options in (["--run=without"], [SECOND, "--run=with"]):
        assert mmrec(*fit(prepared, *steps(3), f"--init_from={file}", *options)) == 0


@pytest.mark.parametrize(("before", "after"), [("0", "0.5"), ("0.5", "0")])
def test_it_cannot_begin_or_end_on_the_way(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str], before: str, after: str
) -> None:
    assert mmrec(*fit(prepared, f"--model.mtp_loss_weight={before}", *steps(2), "--run=a")) == 0
    kept = (checkpoints("a") / "last.ckpt").read_bytes()
    change = [f"--model.mtp_loss_weight={after}", "--trainer.max_steps=4"]
    capsys.readouterr()
    assert mmrec("fit", "--run=a", "--ckpt_path=last", *change) == 2
    assert (
        f"trained with model.mtp_loss_weight {before}, and cannot be resumed with {after}" in capsys.readouterr().err
    )
    assert (checkpoints("a") / "last.ckpt").read_bytes() == kept
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=4") == 0
