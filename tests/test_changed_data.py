"""Training resumed between two epochs with other batches: place in the text, counts and schedule agree."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from conftest import Command, make_text
from helpers import checkpoints, fit, last, losses
from processes import run

from mmrec.data.batches import SegmentSampler
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare
from mmrec.data.store import open_tokens

BATCHES = 21
"""Of an epoch of the quick training: 9,600 tokens, 2 rows of 230."""
EPOCHS = 3
"""Of the run of ``small_root``."""
EVERY_STEP = "--trainer.log_every_n_steps=1"
CHANGES: dict[str, tuple[list[str], str]] = {
    "shorter sequences": (["--data.seq_len=115"], "data.seq_len 230 -> 115"),
    "longer sequences": (["--data.seq_len=460"], "data.seq_len 230 -> 460"),
    "a smaller batch": (["--data.batch_size=1"], "data.batch_size 2 -> 1"),
    "a larger batch": (["--data.batch_size=5"], "data.batch_size 2 -> 5"),
    "shorter segments": (["--data.segment_len=500"], "data.segment_len 2048 -> 500"),
    "longer segments": (["--data.segment_len=4800"], "data.segment_len 2048 -> 4800"),
    "interleaved streams": (["--data.interleave=2"], "data.interleave 1 -> 2"),
    "another order": (["--data.seed=3"], "data.seed 0 -> 3"),
    "another text": (["--data.data_dir=grown"], "-> grown"),
    "accumulated gradients": (["--trainer.accumulate_grad_batches=4"], ""),
    "several at once": (
        ["--data.seq_len=150", "--data.batch_size=3", "--trainer.accumulate_grad_batches=3"],
        "data.batch_size 2 -> 3, data.seq_len 230 -> 150",
    ),
}


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """A longer text of the same alphabet."""
    (tmp_path / "grown.txt").write_text(make_text() + make_text()[:7_000], encoding="utf-8")
    prepare(PrepareOptions(input_file=tmp_path / "grown.txt", output_dir=tmp_path / "grown", tokenizer="characters"))
    return tmp_path / "grown"


def batches(folder: Path, rows: int = 2, seq_len: int = 230, segment_len: int = 2048) -> int:
    return len(SegmentSampler(open_tokens(folder).train, rows, seq_len, segment_len=segment_len))


def batches_with(change: list[str], prepared: Path, grown: Path) -> int:
    """Return the batches of an epoch after ``change``."""
    given = {name.removeprefix("--data."): value for name, _, value in (one.partition("=") for one in change)}
    folder = grown if "data_dir" in given else prepared
    numbers = {name: int(given[option]) for name, option in SIZES.items() if option in given}
    return batches(folder, **numbers)


SIZES = {"rows": "batch_size", "seq_len": "seq_len", "segment_len": "segment_len"}


# The last checkpoint is of after the validation of the epoch, the previous one of before it.
@pytest.mark.parametrize(
    ("checkpoint", "case"),
    [*(("last", case) for case in CHANGES), ("previous", "another text"), ("previous", "several at once")],
)
def test_the_next_epoch_is_a_whole_one_and_the_schedule_ends_with_it(
    case: str, checkpoint: str, mmrec: Command, small_root: Path, grown: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, says = CHANGES[case]
    shutil.copytree(small_root / "lightning_logs", "lightning_logs")
    again = ["fit", f"--ckpt_path={checkpoints('a')}/{checkpoint}.ckpt", f"--trainer.max_epochs={EPOCHS + 1}"]
    assert mmrec(*again, EVERY_STEP, *change) == 0
    accumulated = next((int(one.rpartition("=")[2]) for one in change if "accumulate" in one), 1)
    epoch = batches_with(change, small_root / "tokens", grown)
    done = EPOCHS * BATCHES
    updates = done + math.ceil(epoch / accumulated)
    end = last("a")
    assert end["global_step"] == updates
    assert end["epoch"] == EPOCHS
    assert end["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == (EPOCHS + 1) * epoch
    # Five updates of warm-up, then a cosine over all that are left, to a twentieth: no step back, no rest at the end.
    rates = losses("a", "train/learning_rate")
    for step in (done, updates - 1):
        share = 0.5 * (1 + math.cos(math.pi * (step - 5) / (updates - 5)))
        assert rates[step] == pytest.approx(3e-3 * (0.05 + 0.95 * share), rel=1e-4)
    assert max(losses("a", "val/loss")) == updates - 1
    assert says in caplog.text


@pytest.mark.parametrize("change", [["--data.seq_len=115"], ["--data.batch_size=3"], ["--data.data_dir=grown"]])
def test_within_an_epoch_what_would_skip_text_is_refused(
    change: list[str], mmrec: Command, prepared: Path, grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=10", "--run=a")) == 0
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=-1", *change) == 2
    assert "stands within an epoch" in capsys.readouterr().err


def test_another_text_in_the_same_folder_is_refused_within_an_epoch_and_told_between_two(
    mmrec: Command,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of as many tokens: nothing but their digest tells them apart."""
    (tmp_path / "reversed.txt").write_text(make_text()[::-1], encoding="utf-8")
    other = tmp_path / "reversed"
    prepare(PrepareOptions(input_file=tmp_path / "reversed.txt", output_dir=other, tokenizer="characters"))
    tokens = open_tokens(prepared), open_tokens(other)
    assert len(tokens[0].train) == len(tokens[1].train)
    folder = prepared.rename(tmp_path / "text")
    assert mmrec(*fit(folder, "--trainer.max_steps=10", "--run=a")) == 0
    assert mmrec(*fit(folder, "--trainer.max_epochs=1", "--run=b")) == 0
    folder.rename(tmp_path / "before")
    other.rename(folder)
    capsys.readouterr()
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=12") == 2
    assert f"(text {tokens[0].digest[:16]} there, {tokens[1].digest[:16]} here; " in capsys.readouterr().err
    caplog.clear()
    assert mmrec("fit", "--run=b", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert f"data.text {tokens[0].digest[:16]} -> {tokens[1].digest[:16]}" in caplog.text


def test_within_an_epoch_gradients_may_be_accumulated_otherwise(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=10", "--trainer.max_epochs=2", "--run=a")) == 0
    again = ["fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=-1", "--trainer.max_epochs=2", EVERY_STEP]
    assert mmrec(*again, "--trainer.accumulate_grad_batches=5") == 0
    assert last("a")["global_step"] == 10 + 3 + 5
    share = 0.5 * (1 + math.cos(math.pi * (17 - 5) / (18 - 5)))
    assert min(losses("a", "train/learning_rate").values()) == pytest.approx(3e-3 * (0.05 + 0.95 * share), rel=1e-4)


@pytest.mark.slow
def test_other_processes_read_the_next_epoch(prepared: Path, tmp_path: Path) -> None:
    run(tmp_path, *fit(prepared, "--trainer.max_epochs=1", "--run=a"))
    again = ["fit", "--run=a", "--ckpt_path=last", "--trainer.max_epochs=2", "--trainer.devices=2"]
    run(tmp_path, *again, "--trainer.strategy=ddp", ranks=2)
    assert last("a", tmp_path)["global_step"] == BATCHES + batches(prepared, rows=4)
