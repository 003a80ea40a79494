"""Options of mmrec fit that are given to mmrec train: the plan is made for what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from helpers import last

from mmrec.core.errors import UserError
from mmrec.model import layer_parameters
from mmrec.planning.by_hand import ByHand
from mmrec.planning.machine import measure_rates
from mmrec.planning.options import value_of
from mmrec.planning.plan import (
    MANY_TOKENS,
    SHAPES,
    Batches,
    Candidate,
    Rate,
    Text,
    choose_batches,
    fit_options,
    make_plan,
    shapes_for,
)

TEXT = Text(1_000_000, 100_000, 65, 1.0, 2.5, 2.4)
WORDS = replace(TEXT, vocab_size=1024)


def test_without_options_of_the_model_a_plan_chooses_from_all_shapes() -> None:
    for text in (TEXT, WORDS):
        planned = [Candidate.of(config, text) for config in shapes_for(text)]
        assert ByHand().candidates(text) == planned
        assert ByHand(["--model.dropout=0.3"]).candidates(text) == planned


def test_a_width_given_by_hand_holds_for_every_shape_that_can_have_it() -> None:
    found = [each.config for each in ByHand(["--model.config.dim", "100"]).candidates(WORDS)]
    assert {config.dim for config in found} == {100}
    assert {config.heads for config in found} == {2, 4}  # 100 is no multiple of the others
    assert [layer_parameters(config) for config in found] == sorted(layer_parameters(config) for config in found)
    assert {config.count_half_lives for config in found} == {shapes_for(WORDS)[0].count_half_lives}


def test_a_model_given_as_a_whole_is_the_only_one() -> None:
    config = replace(SHAPES[-1], dim=512, heads=8)
    fields = {"dim": 512, "layers": 12, "layer_types": ["short", "long"], "heads": 8, "ffn_dim": 2048}
    whole = ByHand([f"--model.config={json.dumps(fields)}"])
    one_by_one = ByHand([f"--model.config.{name}={json.dumps(value)}" for name, value in fields.items()])
    for given in (whole, one_by_one):
        assert given.candidates(TEXT) == [Candidate.of(config, TEXT)]


def test_a_model_that_no_shape_can_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"is not a multiple of model\.config\.heads 7"):
        ByHand(["--model.config.heads=7"]).candidates(TEXT)


def test_batches_given_by_hand_take_the_place_of_the_plans() -> None:
    planned = choose_batches(SHAPES[0], TEXT.train_tokens)
    found = ByHand(["--data.batch_size", "3", "--data.seq_len=77"]).candidates(TEXT)
    assert found[0].batches == Batches(3, 77, planned.interleave)
    assert ByHand(["--data.interleave=2"]).candidates(TEXT)[0].batches == replace(planned, interleave=2)


def test_rows_given_by_hand_stay_however_much_is_read() -> None:
    found = [ByHand(options).candidate(SHAPES[0], TEXT, MANY_TOKENS) for options in ([], ["--data.batch_size=8"])]
    assert [each.batches.rows for each in found] == [16, 8]
    two = ByHand(["--trainer.devices=2", "--trainer.strategy=ddp"])  # each reads half of it, in as many updates
    assert [two.candidate(SHAPES[0], TEXT, copies * MANY_TOKENS).batches.rows for copies in (1, 2)] == [8, 16]


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ([], None),
        (["--trainer.max_steps=40"], 40),
        (["--trainer.max_steps", "-1"], None),
        (["--trainer.max_epochs=2"], 2000),
        (["--trainer.max_epochs=2", "--trainer.max_steps=40"], 40),
        (["--trainer.max_epochs=-1"], None),
        (["--trainer.max_epochs=1", "--trainer.max_steps=-1"], 1000),
    ],
)
def test_a_limit_given_by_hand_is_one_of_the_plan(options: list[str], most: int | None) -> None:
    assert ByHand(options).most_steps(Batches(10, 100, 1), TEXT) == most


@pytest.mark.parametrize(
    ("options", "processes", "copies"),
    [
        ([], None, 1),
        (["--trainer.devices=1"], 1, 1),
        (["--trainer.devices", "2"], 2, 1),
        (["--trainer.devices", "2", "--trainer.strategy=cores"], 2, 1),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], 1, 2),
        (["--trainer.devices=2", "--trainer.strategy=auto"], 1, 2),
        (["--trainer.devices=1", "--trainer.strategy=auto"], 1, 1),
        (["--trainer.devices=auto"], 1, 1),
        (["--trainer.strategy=ddp"], 1, 1),
        (["--trainer.strategy=cores"], None, 1),
    ],
)
def test_processes_share_out_the_rows_or_have_copies_of_their_own(
    options: list[str], processes: int | None, copies: int
) -> None:
    given = ByHand(options)
    assert (given.processes, given.copies) == (processes, copies)
    assert {each.batches.copies for each in given.candidates(TEXT)} == {copies}


@pytest.mark.parametrize(("devices", "copies"), [("1", 1), ("4", 4), ("-1", 4), ("auto", 4), ("[1,3]", 2)])
def test_several_gpus_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch, devices: str, copies: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    given = ByHand([f"--trainer.devices={devices}"], "cuda")
    assert (given.processes, given.copies) == (1, copies)


@pytest.mark.parametrize("devices", ["2", "0", "0,1", "two", "auto"])
def test_gpus_that_are_not_there_are_refused(devices: str) -> None:
    with pytest.raises(UserError, match=f"^--trainer.devices is {devices}"):
        ByHand([f"--trainer.devices={devices}"], "cuda")


def test_a_plan_counts_the_tokens_of_all_copies() -> None:
    alone = Candidate.of(SHAPES[1], TEXT)
    both = ByHand(["--trainer.devices=2", "--trainer.strategy=ddp"]).candidates(TEXT)[1]
    assert both.batches == replace(alone.batches, copies=2)
    one = make_plan(TEXT, [Rate(alone, 10_000.0)], 60)
    two = make_plan(TEXT, [Rate(both, 20_000.0)], 60)
    assert two.steps == one.steps
    assert two.epochs == 2 * one.epochs
    assert two.expected < one.expected
    assert "updates of 8 x 128 tokens, for each of 2 processes: " in two.describe(60, 1)
    # Each copy scores the whole validation text: as much as one alone, which has as many updates.
    for name in ("--trainer.val_check_interval", "--trainer.limit_val_batches", "--data.batch_size"):
        assert value_of(fit_options(two), name) == value_of(fit_options(one), name)
    longest = [make_plan(TEXT, [Rate(each, 1e9)], 3600) for each in (alone, both)]
    assert [round(plan.epochs) for plan in longest] == [30, 30]


def test_the_copies_of_a_text_leave_room_for_several_updates() -> None:
    short = replace(TEXT, train_tokens=4_000)
    found = ByHand(["--trainer.devices=2", "--trainer.strategy=ddp"]).candidates(short)
    assert all(each.batches.tokens * 2 <= short.train_tokens for each in found)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--data.seq_len=1000000"], "--data.seq_len is 1000000; it must be less than the 1,000,000 tokens"),
        (["--data.batch_size=3", "--trainer.devices=2"], "cannot share out the 3 rows of an update evenly"),
    ],
)
def test_batches_that_a_text_or_processes_have_no_room_for_are_refused(options: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        ByHand(options).candidates(TEXT)


def test_a_model_that_there_is_no_memory_for_is_refused() -> None:
    config = replace(SHAPES[0], dim=2**20, heads=1, ffn_dim=2**22)
    with pytest.raises(UserError, match="too little memory for 3 layers of 1048576 and 1 x 16 tokens an update"):
        measure_rates(TEXT, [Candidate(config, Batches(1, 16, 1))], 1.0, "cpu", 1)


def test_the_plan_that_is_said_is_the_one_that_is_trained(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real trial, of the one model that is left to it."""
    shape = {"dim": 24, "layers": 2, "heads": 3, "ffn_dim": 32}
    line = ["train", novel, *(f"--model.config.{name}={value}" for name, value in shape.items())]
    line += ["--data.batch_size=2", "--data.seq_len=32", "--trainer.max_steps=6", "--minutes=1"]
    line += ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.devices=1"]
    assert mmrec(*line, "--plan") == 0
    said = capsys.readouterr().out
    assert "2 layers of 24" in said
    assert "6 updates of 2 x 32 tokens" in said
    assert mmrec(*line) == 0
    assert "6 updates of 2 x 32 tokens" in capsys.readouterr().out
    record: dict[str, Any] = json.loads(Path("lightning_logs/novel/plan.json").read_text(encoding="utf-8"))
    assert record["steps"] > 6  # there is time for more, and the trainer holds the limit
    assert last("novel")["global_step"] == 6
    assert value_of(record["options"], "--model.warmup_steps") == "1"
    assert json.loads(str(value_of(record["options"], "--model.config")))["dim"] == 24


@pytest.mark.parametrize(
    ("limit", "steps"),
    [("--trainer.max_epochs=60", 120), ("--trainer.max_steps=100", 100), ("--trainer.max_epochs=2", 4)],
)
def test_a_limit_beyond_that_of_a_plan_is_reached(
    mmrec: Command, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], limit: str, steps: int
) -> None:
    """A plan by itself reads a text 30 times at most, which are 56 updates here."""
    path = tmp_path / "short.txt"
    path.write_text(text[:600], encoding="utf-8")
    shape = {"dim": 24, "layers": 1, "heads": 1, "ffn_dim": 24}
    line = ["train", path, "--minutes=5", *(f"--model.config.{name}={value}" for name, value in shape.items()), limit]
    line += ["--data.batch_size=8", "--data.seq_len=32", "--trainer.logger=false", "--trainer.devices=1"]
    assert mmrec(*line, "--trainer.enable_progress_bar=false") == 0
    assert f"{steps} updates of 8 x 32 tokens" in capsys.readouterr().out
    assert last("short")["global_step"] == steps


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--model.dropuot=0.1", "did you mean 'model.dropout'?"),
        ("--trainer.max_steps=few", "must be a whole number"),
        ("--data.batch_size=0", "data.batch_size is 0; it must be at least 1"),
        ("--data.batch_size=", "--data.batch_size is empty; it must be a whole number"),
        ("--model.dropout=5", "model.dropout is 5"),
        ("--trainer.max_steps=0", "--trainer.max_steps is 0; it must be at least 1, or -1 for no limit"),
        ("--trainer.max_epochs=0", "--trainer.max_epochs is 0; it must be at least 1"),
        (
            "--trainer.devices=0",
            "--trainer.devices is 0: `devices` selected with `CPUAccelerator` should be an int > 0",
        ),
        ("--trainer.devices=99999999999", "--trainer.devices is 99999999999; it must be from 1"),
    ],
)
def test_an_option_that_is_wrong_is_refused_before_the_text_is_prepared(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str], option: str, word: str
) -> None:
    assert mmrec("train", novel, option) == 2
    told = capsys.readouterr().err
    assert word in told
    assert len(told.strip().splitlines()) == 1
    assert not Path("data").exists()
