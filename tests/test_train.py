"""mmrec train: one line from a text to a model."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import SMALL, last, record

from mmrec.checkpoints.runs import run_option, runs
from mmrec.planning import half_way
from mmrec.planning.half_way import END_OVER_HALF, HalfWayLine
from mmrec.planning.law import LAW
from mmrec.planning.options import value_of
from mmrec.planning.plan import Candidate, Rate, Text
from mmrec.planning.record import Record, read_record
from mmrec.training.callbacks.half_way import HalfWayScore
from mmrec.training.options import OptimizerOptions

pytestmark = pytest.mark.usefixtures("quick_trial")


def test_a_plan_is_said_and_nothing_trained(mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("train", novel, "--plan") == 0
    said = capsys.readouterr().out
    assert "model       about 0.15 M parameters: 3 layers of 64" in said
    assert "epochs" in said
    assert "bits/byte" in said
    assert not Path("lightning_logs").exists()


def test_one_line_trains_and_says_what_came_of_it(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[HalfWayScore] = []
    known = half_way.is_known

    def look(score: HalfWayScore) -> bool:
        seen.append(score)
        return known(score)

    monkeypatch.setattr(half_way, "FEWEST_UPDATES", 8)
    monkeypatch.setattr(half_way, "is_known", look)
    line = ["train", novel, "--trainer.logger=false", "--trainer.max_steps=8", "--trainer.val_check_interval=1"]
    assert mmrec(*line) == 0
    said = capsys.readouterr().out
    assert [(score.step, score.planned_steps) for score in seen] == [(4, 8)]
    expected = record()["half_way"]
    assert expected == END_OVER_HALF * seen[0].bits_per_byte
    low, high = (expected * math.exp(part * half_way.SPREAD) for part in (-1, 1))
    told = f"half-way    {expected:.2f} bits/byte are expected now ({low:.2f} to {high:.2f} two times of three)"
    assert said.splitlines().count(told) == 1  # a line of its own beside the progress bar
    assert f"; {record()['expected']:.3f} were expected at first, {expected:.3f} half-way\n" in said
    assert "validation  " in said
    assert "bits/byte by xz, " in said
    assert " by PPMd, after the training text" in said
    assert "bits/byte, learning and counting n-grams as it reads\n" in said
    assert "It writes:" in said
    assert "mmrec generate --run novel" in said
    assert last("novel")["global_step"] == 8
    assert record()["finished"]
    # What was planned is an ordinary config.
    assert mmrec("fit", "--config=lightning_logs/novel/config.yaml", "--run=again") == 0
    weights, again = last("novel")["state_dict"], last("again")["state_dict"]
    assert all(weights[name].equal(again[name]) for name in weights)


@pytest.mark.parametrize(("power", "run"), [(0.0, "novel-bpe"), (9.0, "novel")])
def test_of_two_tokenizers_the_one_of_which_more_is_expected_is_trained_with(
    mmrec: Command,
    novel: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    power: float,
    run: str,
) -> None:
    """Words need a text to be learned from: with a high power this one is too short."""
    from mmrec.planning import command, plan

    law = replace(LAW, counting=0.5, counting_power=power)

    def measure(text: plan.Text, *_: object) -> list[Rate]:
        return [Rate(Candidate.of(plan.shapes_for(text)[0], text), 3000.0)]

    monkeypatch.setattr("mmrec.planning.source.FEW_WORDS", 10)
    monkeypatch.setattr(command, "measure_rates", measure)
    monkeypatch.setattr(command, "make_plan", lambda *given, **_: plan.make_plan(given[0], given[1], given[2], law))
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=2"]
    assert mmrec(*line, "--plan") == 0
    first, second = ("bpe", "bytes")[:: 1 if power == 0 else -1]
    assert re.search(
        rf"tokens      by {first}: [\d.]+ bits/byte are expected, [\d.]+ by {second}", capsys.readouterr().out
    )
    assert mmrec(*line, "--trainer.max_steps=4") == 0
    assert last(run)["global_step"] == 4
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    assert "longer      " in capsys.readouterr().out
    assert last(run)["global_step"] == 8
    assert runs(Path()) == [run]


@pytest.mark.parametrize(("rows", "processes"), [("1", "1"), ("6", "2"), ("8", "4")])
def test_rows_given_by_hand_are_shared_out_by_as_many_processes_as_can(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, rows: str, processes: str
) -> None:
    from mmrec.planning import command

    given: list[list[str]] = []
    monkeypatch.setattr(command, "with_processes_that_pay", lambda rate, *_: replace(rate, processes=4))
    monkeypatch.setattr(command, "report", lambda *_: (2.0, ""))
    monkeypatch.setattr(command, "run_lightning", lambda _, options, *__: given.append(options))
    assert mmrec("train", novel, "--data.batch_size", rows) == 0
    assert value_of(given[0], "--trainer.devices") == processes
    assert value_of(given[0], "--trainer.strategy") == ("cores" if processes != "1" else "auto")
    assert mmrec("train", novel, "--run=b", f"--data.batch_size={rows}", "--trainer.devices=1") == 0
    assert value_of(given[1], "--trainer.devices") == "1"  # what is said by hand wins


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--minutes=0"], "at least 0.1"),
        (["--minutes=1e9"], "at most 525,600"),
        (["--data.data_dir=data/other"], "--data.data_dir is for mmrec fit"),
        (["--trainer.default_root_dir", "other"], "--trainer.default_root_dir is for mmrec fit"),
        (["--trainer.fast_dev_run=2"], "--trainer.fast_dev_run is for mmrec fit"),
        (["-c", "small"], "-c is for mmrec fit; mmrec train makes a config of its own"),
        (["--config=small"], "--config is for mmrec fit; mmrec train makes a config of its own"),
        (["--trainer.accumulate_grad_batches=4"], "as many rows as --data.batch_size says"),
        (["--run="], "--run is ''; it must be a name"),
        (["--ckpt_path=last"], "goes on from its last checkpoint where it is typed again"),
        (["--init_from", "hf:owner/name"], "by mmrec prepare --tokenizer"),
        (["--tokenizer=letters"], "characters, bytes, bpe"),
        (["--on=moon"], "moon"),
        pytest.param(
            ["--on=gpu"], "torch finds no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
        (["--model.dim=3"], "dim"),
        (["--minutes=few"], "minutes"),
        (["--run=../elsewhere"], "name of a folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    mmrec: Command, novel: Path, args: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", novel, *args) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert word in said[0]
    assert not Path("elsewhere").exists()
    assert not Path("../elsewhere").exists()


def test_a_training_that_reads_much_is_tried_with_the_rows_that_it_has(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmrec.planning import command

    tried: list[int] = []

    def measure(_: Text, candidates: list[Candidate], *__: object) -> list[Rate]:
        tried.append(candidates[0].batches.rows)
        return [Rate(candidates[0], 3000.0 if len(tried) == 1 else 4000.0)]

    monkeypatch.setattr(command, "measure_rates", measure)
    monkeypatch.setattr("mmrec.planning.plan.MANY_TOKENS", 100)
    monkeypatch.setattr("mmrec.planning.plan.FEW_EPOCHS", 100)
    assert mmrec("train", novel, "--tokenizer=bytes", "--minutes=0.3", "--plan") == 0
    assert tried == [8, 16]
    said = re.search(r" updates of 16 x 128 tokens: ([\d.]+) M tokens", capsys.readouterr().out)
    assert said is not None
    assert 0 < float(said[1]) < 18 * 4000 / 1e6


def test_a_text_that_is_not_there_is_refused(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("train", "nothing.txt") == 2
    assert "nothing.txt" in capsys.readouterr().err


def test_a_text_of_a_few_characters_is_refused_before_anything_is_planned(
    mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ten.txt").write_text("abcdefghij", encoding="utf-8")
    assert mmrec("train", "ten.txt") == 2
    out, err = capsys.readouterr()
    assert err.strip() == (
        "mmrec: error: the text has 10 tokens, too few to train on and to validate with; "
        "give one of a few hundred characters at least"
    )
    assert "expected" not in out
    assert not Path("lightning_logs").exists()


def test_lines_to_type_next_are_right_for_any_name(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("-my novel.txt").write_text(text, encoding="utf-8")
    assert mmrec("train", "./-my novel.txt", *SMALL, "--trainer.max_steps=2") == 0
    said = capsys.readouterr().out
    assert "  mmrec generate --run='-my novel' --length 1000\n" in said
    assert "  mmrec report 'lightning_logs/-my novel'\n" in said
    assert mmrec("generate", *shlex.split("--run='-my novel' --length=5")) == 0
    assert run_option("my novel") == "--run 'my novel'"


def test_a_run_of_a_name_that_libraries_replace_is_refused(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("$HOME.txt").write_text(text, encoding="utf-8")
    assert mmrec("train", "$HOME.txt", *SMALL, "--trainer.max_steps=1") == 2
    assert "the run '$HOME': TensorBoard takes a $" in capsys.readouterr().err
    assert mmrec("train", "$HOME.txt", *SMALL, "--trainer.max_steps=1", "--run=home") == 0


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_the_standard_input_is_no_text_to_train_on(
    mmrec: Command, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", name) == 2
    assert "write the standard input to a file, and name that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        ({}, True),
        ({"step": 496}, True),
        ({"step": 560}, False),
        ({"epochs": 9.0}, False),
        ({"epochs": 6.0}, True),
        ({"epochs": 6.0, "vocab_size": 1024}, False),
        ({"vocab_size": 1024}, True),
        ({"planned_steps": 100, "step": 50}, False),
        ({"options": OptimizerOptions(schedule="cosine")}, False),
        ({"options": OptimizerOptions(schedule="wsd", decay_ratio=0.5)}, False),
    ],
)
def test_what_is_expected_half_way_is_said_of_trainings_that_were_looked_at(
    tmp_path: Path, change: dict[str, Any], is_known: bool
) -> None:
    score = HalfWayScore(2.0, 500, 1000, 3.0, 256, OptimizerOptions(schedule="wsd"))
    line = HalfWayLine(Record("data", 1.0, 1000, [], 2.5, 2.1), tmp_path)
    said = line(replace(score, **change))
    expected = 2.0 * END_OVER_HALF
    assert (said is not None) == is_known
    assert line.record.half_way == (expected if is_known else None)
    if said is not None:
        assert f"{expected:.2f} bits/byte" in said
        assert read_record(tmp_path) == line.record


def test_a_file_whose_name_begins_with_a_dash_can_be_named(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("-a.txt").write_text(text, encoding="utf-8")
    assert mmrec("train", "-a.txt", "--plan") == 2
    told = "-a.txt: is read as an option, as all that begins with a dash; write ./-a.txt"
    assert capsys.readouterr().err == f"mmrec: error: {told}\n"
    assert mmrec("train", "./-a.txt", "--plan") == 0


def test_a_text_in_another_encoding_trains_where_that_is_named(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("novel.txt").write_bytes(text.encode("utf-16"))
    assert mmrec("train", "novel.txt", "--plan") == 2
    assert "--encoding: utf-16" in capsys.readouterr().err
    assert mmrec("train", "novel.txt", "--plan", "--encoding=utf-16") == 0
    assert "expected" in capsys.readouterr().out
