"""What is expected of a training that is made longer, and what it has against overfitting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from helpers import BATCH, SMALL, checkpoints, fit, last, record
from lightning.pytorch import Callback

from mmrec.checkpoints.loading import load_model
from mmrec.data.store import open_tokens
from mmrec.model import layer_parameters
from mmrec.planning import command, longer
from mmrec.planning.law import LAW
from mmrec.planning.plan import SHAPES
from mmrec.planning.record import Record, read_intact, read_record, seconds_trained
from mmrec.training.callbacks.half_way import HalfWay
from mmrec.training.cli import run_lightning

pytestmark = pytest.mark.usefixtures("quick_trial")


def test_a_longer_training_says_what_is_expected_of_it(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added: list[list[type]] = []

    def noted(subcommand: str, options: list[str], line: str, callbacks: list[Callback]) -> None:
        added.append([type(each) for each in callbacks])
        run_lightning(subcommand, options, line, callbacks)

    monkeypatch.setattr(command, "run_lightning", noted)
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    came = record()["came"]
    assert f"validation  {came:.3f} bits/byte" in capsys.readouterr().out
    assert mmrec(*line, "--plan", "--trainer.max_steps=16") == 0
    assert "expected" not in capsys.readouterr().out  # too little was read for the law to know more
    monkeypatch.setattr(longer, "FEWEST_TOKENS", 8 * 1024)
    assert mmrec(*line, "--plan", "--trainer.max_steps=8") == 0  # of a shorter one no more than came
    assert f"; no better model than that of {came:.2f} bits/byte is expected" in capsys.readouterr().out
    assert mmrec(*line, "--trainer.max_steps=16") == 0
    expected = record()["expected"]
    assert expected < came
    said = capsys.readouterr().out
    assert f"; {expected:.2f} bits/byte are expected (" in said
    assert f", {came:.2f} before\n" in said
    assert f"; {expected:.3f} were expected\n" in said
    assert record()["came"] != came
    assert [HalfWay in each for each in added] == [True, False]  # at its begin more is known than half-way


def test_a_training_that_was_killed_at_its_end_is_scored_and_not_taken_for_the_one_before(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> tuple[float, str]:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(longer, "FEWEST_TOKENS", 1)
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=4") == 0
    assert record()["came"] is not None
    with monkeypatch.context() as patched:
        patched.setattr(command, "report", killed)
        assert mmrec(*line, "--trainer.max_steps=8") == 2
    assert record()["came"] is None
    assert not record()["finished"]
    expected = record()["expected"]
    capsys.readouterr()
    assert mmrec(*line, "--trainer.max_steps=8") == 0  # says what came of it, before it trains for longer
    said = capsys.readouterr().out
    assert "resumed     " in said
    assert f"; {expected:.3f} were expected\n" in said
    assert record()["finished"]
    assert last("novel")["global_step"] == 8
    (checkpoints("novel") / "best.ckpt").unlink()
    assert mmrec(*line, "--plan", "--trainer.max_steps=16") == 0
    assert "expected" not in capsys.readouterr().out  # what came was of the one that is gone


def test_what_is_expected_of_a_longer_training_is_not_that_of_one_with_other_minutes(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(longer, "FEWEST_TOKENS", 1)
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--minutes=0.2", "--trainer.max_steps=4") == 0
    assert mmrec(*line, "--minutes=0.2", "--trainer.max_steps=8") == 0
    assert record()["is_of_longer"]
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(record() | {"finished": False}))
    capsys.readouterr()
    assert mmrec(*line, "--minutes=3", "--trainer.max_steps=12") == 0
    assert "were expected of a training of another length" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"came": "x"}, {"minutes": None}, {"options": None}, {"options": [1]}, {"expected": float("nan")}]
)
def test_a_plan_with_wrong_values_is_refused(
    mmrec: Command, novel: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoints("novel")
    run.mkdir(parents=True)
    (run / "last.ckpt").write_bytes(b"")
    right = Record("data/novel", 1, None, [], 2.0, 2.0)
    right.write(run.parent)
    assert read_record(run.parent) == right  # also with a whole number of minutes
    (run.parent / "plan.json").write_text(json.dumps(record() | change))
    assert mmrec("train", novel) == 2
    assert "plan.json: is no plan of mmrec train" in capsys.readouterr().err


def test_more_is_expected_of_more_updates_and_nothing_of_a_few(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=6", "--run=short", "--time_limit.minutes=10")) == 0
    checkpoint, folder = checkpoints("short") / "last.ckpt", open_tokens(prepared)
    seconds, tokens, length = seconds_trained(checkpoint), 6 * BATCH[0] * BATCH[1], len(folder.train)
    config = load_model(checkpoint).net.config

    def loss(times: float) -> float:
        return LAW.relative_loss(layer_parameters(config), length, times * tokens)

    earlier = longer.Earlier.of(read_intact(checkpoint), 1, folder)
    assert earlier is not None
    assert earlier.expected(2.0, 9 * tokens) is None
    monkeypatch.setattr(longer, "FEWEST_TOKENS", 1)
    assert earlier.expected(2.0, earlier.tokens_in(3 * seconds, None)) == pytest.approx(2 * loss(3) / loss(1))
    assert earlier.expected(2.0, earlier.tokens_in(9 * seconds, 12)) == pytest.approx(2 * loss(2) / loss(1))
    assert earlier.expected(2.0, tokens / 2) == 2.0
    assert earlier.moved(2.0, tokens, tokens / 2) == pytest.approx(2 * loss(1 / 2) / loss(1))
    copies = longer.Earlier.of(read_intact(checkpoint), 2, folder)
    assert copies is not None
    assert copies.tokens == 2 * earlier.tokens
    seconds_of_all = seconds * len(folder.val) / tokens
    assert 0.1 * seconds_of_all < earlier.scoring_seconds(1) < seconds_of_all  # no backward pass, no optimizer
    assert earlier.scoring_seconds(2) == 2 * earlier.scoring_seconds(1)


def test_a_longer_training_has_more_against_overfitting(prepared: Path) -> None:
    folder = open_tokens(prepared)
    earlier = longer.Earlier(SHAPES[1], 100, 100_000, 9.0, folder)
    before = ["--model.dropout=0.05", "--model.warmup_steps=9", "--model.weight_decay=0.3", "--data.batch_size=8"]
    kept = ["--model.warmup_steps=9", "--data.batch_size=8"]
    more = ["--model.dropout=0.3", "--model.weight_decay=0.5", "--model.confidence_penalty=0.1"]
    assert earlier.options(before, 40 * len(folder.train)) == [*kept, *more]
