"""Lightning's callbacks beside ours: they work, also when a run is resumed, or are refused in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import checkpoints, fit, last, load, losses

from mmrec.training.callbacks import terminal
from mmrec.training.module import RecurrentLMModule

SHORT = "--data.seq_len=640"
"""An epoch of nine batches."""
Scores = Callable[..., None]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """Makes the validations of the next trainings find these losses, one after the other, the last for ever."""

    def use(*values: float) -> None:
        left = list(values)

        def log_score(self: RecurrentLMModule, prefix: str) -> None:
            self.log(f"{prefix}/loss", torch.tensor(left.pop(0) if len(left) > 1 else left[0]))

        monkeypatch.setattr(RecurrentLMModule, "_log_score", log_score)

    return use


# Early stopping and the best checkpoint


def test_patience_counts_anew_after_a_better_loss_before_min_epochs(
    mmrec: Command, prepared: Path, scores: Scores, caplog: pytest.LogCaptureFixture
) -> None:
    scores(1.0, 2.0, 2.0, 0.5, 2.0)
    options = ["--early_stopping.patience=2", "--trainer.min_epochs=4", "--trainer.max_epochs=9"]
    assert mmrec(*fit(prepared, SHORT, *options, "--run=a")) == 0
    assert list(losses("a", "val/loss").values()) == [1.0, 2.0, 2.0, 0.5, 2.0, 2.0]
    assert "Early stopping: no better loss in 2 validations; the best was val/loss 0.5000" in caplog.text


def test_a_run_ends_at_min_epochs_where_patience_is_exhausted_then(
    mmrec: Command, prepared: Path, scores: Scores
) -> None:
    scores(1.0, 2.0)
    options = ["--early_stopping.patience=1", "--trainer.min_epochs=3", "--trainer.max_epochs=9"]
    assert mmrec(*fit(prepared, SHORT, *options, "--run=a")) == 0
    assert len(losses("a", "val/loss")) == 3


@pytest.mark.parametrize(
    ("options", "score", "says"),
    [
        ([], math.inf, "val/loss is not finite"),
        ([], math.nan, "val/loss is not finite"),
        (["--early_stopping.stopping_threshold=3"], 1.0, "val/loss is below early_stopping.stopping_threshold 3"),
        (["--early_stopping.divergence_threshold=0.5"], 1.0, "val/loss is above early_stopping.divergence_threshold"),
    ],
    ids=["infinite", "no number", "low enough", "diverged"],
)
def test_the_terminal_says_why_a_run_ended_early(
    options: list[str],
    score: float,
    says: str,
    mmrec: Command,
    prepared: Path,
    scores: Scores,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores(score)
    assert mmrec(*fit(prepared, SHORT, *options, "--trainer.max_epochs=2", "--run=a")) == 0
    assert caplog.text.count(f"Early stopping: {says}") == 1
    assert (checkpoints("a") / "best.ckpt").exists() == bool(options)
    how = "stopped early, as its options say" if options else "stopped early: the validation loss was not finite"
    assert how in Path("lightning_logs/a/history.jsonl").read_text().splitlines()[-1]


def test_a_loss_that_is_not_finite_is_never_the_best(mmrec: Command, prepared: Path, scores: Scores) -> None:
    scores(math.inf, math.nan, 3.0, math.inf)
    options = ["--early_stopping.check_finite=false", "--trainer.max_epochs=4"]
    assert mmrec(*fit(prepared, SHORT, *options, "--run=a")) == 0
    (best,) = (state for name, state in last("a")["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert float(best["best_model_score"]) == 3.0
    assert torch.load(checkpoints("a") / "best.ckpt", weights_only=True)["epoch"] == 2


# The progress bar


def test_the_bar_counts_the_updates_of_the_whole_training(
    mmrec: Command, prepared: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_ELSEWHERE", 0.0)
    bar = ["--trainer.enable_progress_bar=true", SHORT]
    assert mmrec(*fit(prepared, *bar, "--trainer.max_epochs=2", "--run=a")) == 0
    counted = bars(capfd)
    assert counted[0] == ("Epoch 0", 1, 18)
    assert counted[-1] == ("Epoch 1", 18, 18)
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_epochs=3", bar[0]) == 0
    assert [count for _, *count in bars(capfd)] == [[step, 27] for step in range(18, 28)]


def test_the_bar_ends_where_the_time_does(mmrec: Command, prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    limited = ["--time_limit.minutes=60", "--time_limit.planned_steps=12", "--trainer.max_epochs=-1"]
    assert mmrec(*fit(prepared, "--trainer.enable_progress_bar=true", SHORT, *limited)) == 0
    assert {total for _, _, total in bars(capfd)} == {12}


def test_the_bar_is_drawn_by_time_not_by_updates(
    mmrec: Command, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--trainer.enable_progress_bar=true", "--trainer.max_epochs=3", "--run=a")) == 0
    counted = [made for _, made, _ in bars(capfd)]
    assert counted[0] == 1  # it is seen at once, and is complete at the end
    assert counted[-1] == last("a")["global_step"] > 10
    assert len(counted) < 10


def test_the_bar_counts_all_updates_where_a_validation_draws_it(
    mmrec: Command, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.max_epochs=1", "--trainer.val_check_interval=4"]
    assert mmrec(*fit(prepared, "--trainer.enable_progress_bar=true", *options, "--run=a")) == 0
    assert [made for _, made, _ in bars(capfd)][:3] == [1, 4, 8]


def bars(capfd: pytest.CaptureFixture[str]) -> list[tuple[str, int, int]]:
    """Return what the bar of a training showed since: what stands before it, the updates made and those planned."""
    shown = re.findall(r"(Epoch \d+): [^\r\n]*? (\d+)/(\d+) \[", "".join(capfd.readouterr()))
    seen = dict.fromkeys((name, int(made), int(planned)) for name, made, planned in shown)
    return [(name, made, planned) for name, made, planned in seen if made]


# Lightning's own


@pytest.mark.parametrize(("monitor", "keep"), [("null", 1), ("val/loss", 2)])
def test_a_resumed_run_keeps_as_many_checkpoints_as_it_was_told(
    monitor: str, keep: int, mmrec: Command, prepared: Path
) -> None:
    added = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.save_top_k={keep}"]
    added.append(f"--trainer.callbacks.monitor={monitor}")
    assert mmrec(*fit(prepared, SHORT, *added, "--trainer.max_epochs=2", "--run=a")) == 0
    for epochs in (3, 4):
        assert mmrec("fit", "--run=a", "--ckpt_path=last", f"--trainer.max_epochs={epochs}") == 0
        assert len(list(checkpoints("a").glob("epoch=*.ckpt"))) == keep
    newest = max(int(path.stem.partition("step=")[2].partition("-")[0]) for path in checkpoints("a").glob("epoch=*"))
    assert newest == last("a")["global_step"]


WORK = {
    "validation every third epoch": ["--trainer.check_val_every_n_epoch=3"],
    "validations through epochs": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=7"],
    "time between validations": ["--trainer.val_check_interval=00:00:00:02"],
    "on exception": ["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=exception"],
    "averages": ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.001"],
}


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")  # our schedule is by the update
@pytest.mark.parametrize("case", WORK)
def test_what_works_also_when_it_is_resumed(case: str, mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, SHORT, *WORK[case], "--trainer.max_epochs=2", "--run=a")) == 0
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    assert last("a")["global_step"] == 27
    assert {17, 26} <= set(losses("a", "val/loss"))  # both ends


def test_the_last_update_is_validated_whatever_the_interval(mmrec: Command, prepared: Path) -> None:
    counted = ["--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=4"]
    assert mmrec(*fit(prepared, SHORT, *counted, "--trainer.max_steps=10", "--run=a")) == 0
    assert list(losses("a", "val/loss")) == [3, 7, 9]
    assert load(checkpoints("a") / "best.ckpt")["global_step"] == 10
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=14") == 0
    assert list(losses("a", "val/loss")) == [3, 7, 9, 11, 13]
    assert mmrec(*fit(prepared, SHORT, "--trainer.max_steps=3", "--run=b")) == 0
    assert list(losses("b", "val/loss")) == [2]
