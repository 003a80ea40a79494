"""Lightning's own options, where they cut a training short, change it or cannot be met."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import checkpoints, fit, last, losses
from lightning.pytorch.loggers import CSVLogger

EVERY_STEP = "--trainer.log_every_n_steps=1"
SHORT = ["--trainer.limit_train_batches=5", "--trainer.max_epochs=4", "--model.warmup_steps=1"]  # of 21 batches
EPOCH_OF_9 = "--data.seq_len=640"


def test_short_epochs_are_all_of_one_length(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, *SHORT, "--trainer.limit_train_batches=10", "--run=a", EVERY_STEP)) == 0
    assert list(losses("a", "val/loss")) == [9, 19, 29, 39]
    assert list(losses("a", "train/learning_rate").values())[-1] == pytest.approx(0.05 * 3e-3, rel=0.05)


def test_loaders_that_are_asked_for_again_go_on(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, *SHORT, "--run=a")) == 0
    assert mmrec(*fit(prepared, *SHORT, "--run=b", "--trainer.reload_dataloaders_every_n_epochs=1")) == 0
    one, other = (last(run)["state_dict"] for run in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_of_short_epochs_goes_on(epochs: int, mmrec: Command, prepared: Path) -> None:
    schedule = ["--model.min_lr_ratio=1"]
    assert mmrec(*fit(prepared, *SHORT, "--run=whole", *schedule)) == 0
    assert mmrec(*fit(prepared, *SHORT, "--run=parts", *schedule, f"--trainer.max_epochs={epochs}")) == 0
    assert mmrec("fit", "--run=parts", "--ckpt_path=last", "--trainer.max_epochs=4") == 0
    assert last("parts")["loops"]["fit_loop"]["state_dict"] == last("whole")["loops"]["fit_loop"]["state_dict"]


def test_the_batches_to_overfit_are_read_again_and_again(mmrec: Command, prepared: Path) -> None:
    still = ["--model.learning_rate=0", "--model.dropout=0", "--data.reset_probability=1", EVERY_STEP]
    assert mmrec(*fit(prepared, "--trainer.overfit_batches=2", "--trainer.max_epochs=3", *still, "--run=a")) == 0
    first, second, *others = losses("a").values()
    assert first != second
    assert others == [first, second, first, second]


def test_a_run_without_an_end_keeps_its_rate(mmrec: Command, prepared: Path) -> None:
    never_better = ["--early_stopping.min_delta=100", "--early_stopping.patience=1", EVERY_STEP]
    assert mmrec(*fit(prepared, "--trainer.max_epochs=-1", *never_better, "--run=a")) == 0
    rates = list(losses("a", "train/learning_rate").values())
    assert rates[5:] == pytest.approx([3e-3] * 37)


def test_the_throughput_is_logged_as_often_as_the_loss(mmrec: Command, prepared: Path) -> None:
    accumulated = ["--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=4"]
    assert mmrec(*fit(prepared, *accumulated, "--run=a")) == 0
    assert losses("a", "train/tokens_per_second").keys() == losses("a").keys()


def test_an_update_of_fewer_batches_takes_their_mean(mmrec: Command, prepared: Path) -> None:
    for run, batches in (("whole", 5), ("cut", 8), ("uneven", 3)):
        options = [f"--trainer.accumulate_grad_batches={batches}", "--trainer.limit_train_batches=5"]
        options += ["--trainer.max_epochs=1", "--trainer.gradient_clip_val=null", "--model.warmup_steps=0"]
        assert mmrec(*fit(prepared, *options, f"--run={run}", "--model.dropout=0", "--model.optimizer=adamw")) == 0
    whole, cut = (last(run)["optimizer_states"][0]["state"] for run in ("whole", "cut"))
    for number, state in whole.items():  # (1 - beta) times the one gradient that there was
        torch.testing.assert_close(cut[number]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-9)
    assert last("uneven")["global_step"] == 2


def test_a_run_that_was_never_validated_is_read_from_its_last_checkpoint(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--run=a")) == 0
    assert mmrec("generate", "--length=1") == 2
    assert "no validation had a finite loss yet, or --best.save_top_k is 0: take last" in capsys.readouterr().err
    assert mmrec("generate", "--length=1", "--ckpt=last") == 0


def test_a_run_that_only_tries_keeps_nothing(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.fast_dev_run=true", "--run=a")) == 0
    assert not list(Path().rglob("*.ckpt"))


def test_the_run_log_says_why_a_run_ended_early(mmrec: Command, prepared: Path) -> None:
    never_better = ["--early_stopping.min_delta=100", "--early_stopping.patience=1"]
    low_enough = ["--early_stopping.stopping_threshold=100"]
    in_time = ["--trainer.max_epochs=-1", "--time_limit.minutes=60", "--time_limit.planned_steps=3"]
    cases = [(never_better, "no longer fell"), (low_enough, "as its options say"), (in_time, "reached its end")]
    for run, (options, says) in zip("abc", cases, strict=True):
        assert mmrec(*fit(prepared, *options, f"--run={run}")) == 0
        assert says in Path(f"lightning_logs/{run}/history.jsonl").read_text().splitlines()[-1]


def test_another_name_is_another_run_and_replaces_none(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b"):
        assert mmrec(*fit(prepared, EPOCH_OF_9, "--trainer.max_epochs=1", f"--run={run}")) == 0
    files = {path: path.read_bytes() for run in ("a", "b") for path in checkpoints(run).iterdir()}
    here = "--ckpt_path=lightning_logs/a/checkpoints/last.ckpt"
    assert mmrec("fit", here, "--run=branch", "--trainer.max_epochs=2") == 0
    assert last("branch")["global_step"] == 18
    assert mmrec("fit", here, "--run=b", "--trainer.max_epochs=2") == 2
    assert "the run 'b' already exists" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == files
    # A link is another way to the same run, wherever it leads.
    Path("link").symlink_to("lightning_logs/branch")
    Path("lightning_logs/branch/checkpoints").rename("elsewhere")
    checkpoints("branch").symlink_to(Path("elsewhere").absolute())
    for way, epochs in (("link/checkpoints/last.ckpt", 3), ("last", 4)):
        assert mmrec("fit", "--run=branch", f"--ckpt_path={way}", f"--trainer.max_epochs={epochs}") == 0
        assert last("branch")["global_step"] == 9 * epochs
    # The run of another root has the name of one here, which is not touched either.
    other = [EPOCH_OF_9, "--trainer.default_root_dir=other", "--trainer.max_epochs=1", "--run=a"]
    assert mmrec(*fit(prepared, *other)) == 0
    there = ["--ckpt_path=other/lightning_logs/a/checkpoints/last.ckpt", "--trainer.default_root_dir=."]
    assert mmrec("fit", *there, "--trainer.max_epochs=2") == 0
    assert last("version_0")["global_step"] == 18
    assert {path: path.read_bytes() for path in files} == files


REFUSED = {
    "interval": (["--trainer.val_check_interval=1000"], "an epoch has 21 batches"),
    "share": (["--trainer.val_check_interval=1.5"], "invalid value 1.5 for val_check_interval"),
    "nothing": (["--trainer.limit_train_batches=0.0001"], "which leaves none of the 21 batches"),
    "none": (["--trainer.limit_train_batches=0"], "limit_train_batches is 0, which leaves none of the 21 batches"),
    "checkpoints": (["--trainer.enable_checkpointing=false"], "enable_checkpointing=False"),
    "barebones": (
        ["--trainer.barebones=true"],
        "error: --trainer.barebones is true, but every run",
    ),
    "variable": (["--run=$HOME"], "the run '$HOME': TensorBoard takes a $ for that of a variable"),
    "path": (["--run=a/b"], "--run is 'a/b'; it must be the name of a folder"),
    "two best": (["--best.save_top_k=2"], "--best.save_top_k is 2; it must be 1"),
    "parent": (["--run=.."], "--run is '..'"),
    "WandbLogger": (["--trainer.logger=WandbLogger"], "lightning.pytorch.loggers.WandbLogger: Requirement 'wandb"),
    "CometLogger": (["--trainer.logger=CometLogger"], "lightning.pytorch.loggers.CometLogger: Requirement 'comet"),
    "top k of nothing": (
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=3"],
        "ModelCheckpoint(save_top_k=3, monitor=None) is not a valid configuration. No quantity for top_k to track.\n",
    ),
    "incomplete": (
        ["--trainer.logger=CSVLogger"],
        "--trainer.logger is not complete: give --trainer.logger.save_dir",
    ),
    "no logger": (
        ["--trainer.logger=NoLogger"],
        "--trainer.logger is NoLogger; it must be true or false or the name",
    ),
    "no callback": (["--trainer.callbacks+=Nope"], "--trainer.callbacks is Nope; it must be the name of a class"),
    "no option": (
        ["--trainer.logger=CSVLogger", "--trainer.logger.foo=3"],
        "--trainer.logger.foo is none of the options of the class that --trainer.logger names",
    ),
    "an option's nearest": (
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_intervall=step"],
        "options of the class that --trainer.callbacks names; did you mean 'logging_interval'?\n",
    ),
    "no config": (
        ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=3"],
        "cannot be used: the default of an argument, Interval.step: 'step', cannot be saved in a config; give that "
        "argument, too\n",
    ),
    "an option's kind": (
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=x"],
        "--trainer.callbacks.save_top_k is x; it must be a whole number",
    ),
    "choices": (["--trainer.precision=17"], "--trainer.precision is 17; it must be one of 64, 32, 16, "),
    "kind": (["--trainer.max_steps=x"], "--trainer.max_steps is x; it must be a whole number"),
    "one of a kind": (["--model.optimizer=adam"], "--model.optimizer is adam; it must be one of muon, adamw"),
    "share of a text": (
        ["--trainer.limit_val_batches=1.5"],
        "cannot be used here: You have passed invalid value 1.5",
    ),
    "inside of braces": (
        ["--trainer={max_epochs: x}"],
        "error: --trainer.max_epochs is x; it must be a whole number",
    ),
    "no braces": (["--model.config=3"], "--model.config is 3; it must be options as {name: value} or a file of them"),
    "no option inside of braces": (
        ["--model.config={dimm: 3}"],
        "model.config.dimm is none of the options of mmrec fit; did you mean 'model.config.dim'?",
    ),
    "no option of a group": (["--model.lr=3"], "error: Unrecognized arguments: --model.lr=3\n"),
    "no module": (
        ["--trainer.logger=nowhere.Bar"],
        "error: --trainer.logger: the class nowhere.Bar cannot be loaded: No module named 'nowhere'; give one of",
    ),
    "no class of a module": (
        ["--trainer.callbacks=[Timer, torch.nn.Lnear]"],
        "error: --trainer.callbacks: the class torch.nn.Lnear cannot be loaded: module 'torch.nn' has no",
    ),
    "no class in a list": (
        ["--trainer.callbacks=[TQDMProgressBar, Nope]"],
        "error: --trainer.callbacks: there is no class Nope; give one of Lightning's",
    ),
    "no class in braces": (
        ["--trainer.logger={class_path: Nope}"],
        "error: --trainer.logger: there is no class Nope; give one of Lightning's",
    ),
    "another class": (
        ["--trainer.callbacks=torch.nn.Linear"],
        "--trainer.callbacks is torch.nn.Linear; it must be the name of a subclass of Callback",
    ),
    "server": ([f"--trainer.logger={__name__}.NoServer"], "error: the logger NoServer does not start: nobody"),
    "LearningRateFinder": (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder cannot be used"),
    "BatchSizeFinder": (["--trainer.callbacks+=BatchSizeFinder"], "BatchSizeFinder cannot be used"),
}


class NoServer(CSVLogger):
    """A logger whose server is not there."""

    def __init__(self) -> None:
        super().__init__("tables")

    @property
    def experiment(self) -> Any:
        raise RuntimeError("nobody answers")


PACKAGES = {"WandbLogger": "wandb", "CometLogger": "comet_ml"}
"""What is refused where the package is missing."""
FOUND_IN_TRAINING = {"nothing", "none", "two best", "server"}
"""What is found when the run has been begun, whose folder stays."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_line(
    case: str, mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = REFUSED[case]
    if case in PACKAGES and importlib.util.find_spec(PACKAGES[case]):
        pytest.skip(f"{PACKAGES[case]} is installed")
    capsys.readouterr()
    assert mmrec(*fit(prepared, *options)) == 2
    error = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert error.startswith("mmrec: error: ")
    assert says in error
    assert Path("lightning_logs").exists() == (case in FOUND_IN_TRAINING)


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_a_progress_bar_that_is_chosen_takes_the_place_of_ours(bar: str, mmrec: Command, prepared: Path) -> None:
    if bar == "RichProgressBar":
        pytest.importorskip("rich")
    options = [f"--trainer.callbacks={bar}", "--trainer.callbacks.refresh_rate=7", "--trainer.max_steps=2"]
    assert mmrec(*fit(prepared, *options, "--trainer.enable_progress_bar=true", "--run=a")) == 0
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert last("a")["global_step"] == 4


def test_a_score_of_nothing_is_refused(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    assert mmrec("validate", "--ckpt_path=last", "--trainer.limit_val_batches=0") == 2
    assert "nothing was scored" in capsys.readouterr().err


def test_predictions_of_nothing_are_refused_and_those_before_stay(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    assert mmrec("predict", "--ckpt_path=last", "--trainer.limit_predict_batches=1") == 0
    table = Path("lightning_logs/a/predictions.tsv")
    before = table.read_bytes()
    assert mmrec("predict", "--ckpt_path=last", "--trainer.limit_predict_batches=0") == 2
    assert "error: nothing was predicted: --trainer.limit_predict_batches is 0\n" in capsys.readouterr().err
    assert table.read_bytes() == before
