"""mmrec train typed again: it goes on where it was stopped, and trains for longer after its end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import SMALL, checkpoints, fit, last, load, record

from mmrec.checkpoints.runs import lock_run
from mmrec.planning import command
from mmrec.planning.options import value_of
from mmrec.planning.plan import SHAPES, Candidate, Rate, Text
from mmrec.planning.record import Record, read_record

pytestmark = pytest.mark.usefixtures("quick_trial")


def test_typed_again_it_trains_for_longer_and_keeps_its_best(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    best = Path("lightning_logs/novel/checkpoints/best.ckpt")
    assert load(best)["global_step"] == 8
    assert "another length" not in capsys.readouterr().out
    assert mmrec(*line, "--trainer.max_steps=16", "--model.learning_rate=9", "--model.min_lr_ratio=1") == 0
    said = capsys.readouterr().out
    assert "8 updates; it was the best before, too" in said
    assert "were expected of a training of another length" in said
    config = "lightning_logs/novel/config.yaml"
    assert mmrec("fit", "--config", config, "--run=other", "--trainer.max_steps=2", *SMALL) == 0
    assert last("other")["global_step"] == 2  # from the begin, as what has not been trained for longer
    assert last("novel")["global_step"] == 16  # after a rate that spoils it
    assert load(best)["global_step"] == 8
    assert record()["finished"]


def test_a_longer_training_that_is_refused_leaves_all_checkpoints(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    files = [Path(f"lightning_logs/novel/checkpoints/{name}.ckpt") for name in ("best", "last", "stable")]
    before = [file.read_bytes() for file in files]
    assert mmrec(*line, "--model.config.dim=32") == 2
    assert [file.read_bytes() for file in files] == before
    capsys.readouterr()
    damage("best.ckpt")
    before = [file.read_bytes() for file in files]
    assert mmrec(*line) == 2
    assert "move that file away to go on without it" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


def test_a_longer_training_keeps_what_it_came_to_where_the_best_is_gone(mmrec: Command, novel: Path) -> None:
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    ended = last("novel")["state_dict"]
    checkpoints("novel").joinpath("best.ckpt").unlink()
    spoiled = ["--trainer.max_steps=12", "--model.learning_rate=9", "--model.min_lr_ratio=1"]
    assert mmrec(*line, *spoiled) == 0
    kept = load(checkpoints("novel") / "best.ckpt")
    assert kept["global_step"] == 8
    assert all(torch.equal(kept["state_dict"][name], weight) for name, weight in ended.items())


def test_a_longer_training_has_no_best_checkpoint_where_none_is_wanted(mmrec: Command, novel: Path) -> None:
    line = ["train", novel, *SMALL]
    assert mmrec(*line, "--trainer.max_steps=4", "--best.save_top_k=0") == 0
    assert mmrec(*line, "--trainer.max_steps=6", "--best.save_top_k=0") == 0
    assert not checkpoints("novel").joinpath("best.ckpt").exists()
    assert last("novel")["global_step"] == 6


def test_a_longer_training_needs_no_last_checkpoint(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    for name in ("last", "previous"):
        checkpoints("novel").joinpath(f"{name}.ckpt").unlink(missing_ok=True)
    assert mmrec(*line, "--plan") == 0
    assert "longer      lightning_logs/novel/checkpoints/stable.ckpt" in capsys.readouterr().out
    checkpoints("novel").joinpath("stable.ckpt").unlink()
    assert mmrec(*line) == 2
    assert "no last.ckpt in lightning_logs/novel/checkpoints; take best, or another --run" in capsys.readouterr().err


def test_a_config_of_the_run_that_is_none_is_named(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=8") == 0
    config = Path("lightning_logs/novel/config.yaml")
    for content in ("", "[1", "a"):
        config.write_text(content)
        for line in (["train", novel], ["fit", "--run=novel", "--ckpt_path=last"], ["validate", "--ckpt_path=best"]):
            assert mmrec(*line) == 2
            assert f"{config}: is not the config of a run; put back" in capsys.readouterr().err


def test_a_longer_training_that_ends_sooner_may_be_better(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts before the rate of the first one fell."""
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=16", "--model.learning_rate=0.000001") == 0
    capsys.readouterr()
    assert mmrec(*line, "--trainer.max_steps=15", "--model.learning_rate=0.02") == 0
    said = capsys.readouterr().out
    assert "--trainer.max_steps 15 leaves no more updates than the 16 that were made" in said
    assert "15 updates\n" in said


def test_what_came_of_a_training_is_said_after_a_stop_while_it_was_worked_out(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "report", stopped)
        assert mmrec("train", novel, *SMALL, "--trainer.max_steps=4") == 130
    capsys.readouterr()
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=4") == 0
    said = capsys.readouterr().out
    assert "resumed     " in said
    assert "It writes:" in said
    assert last("novel")["global_step"] == 4


def test_a_text_that_was_read_often_ends_its_training_and_is_read_on_when_it_is_typed_again(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmrec.planning import plan

    monkeypatch.setattr(plan, "MOST_EPOCHS", 3)
    assert mmrec("train", novel, "--minutes=20") == 0
    most = 3 * 9600 // 1024
    assert last("novel")["global_step"] == most
    assert "time        0.2 minutes of training" in capsys.readouterr().out  # at the 3,000 tokens/s of the trial
    assert mmrec("train", novel, "--minutes=0.1") == 0
    assert last("novel")["global_step"] > most


def test_typed_again_it_is_not_held_to_the_updates_of_the_first_plan(mmrec: Command, novel: Path) -> None:
    assert mmrec("train", novel, *SMALL, "--minutes=0.1") == 0
    first = last("novel")["global_step"]
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(record() | {"half_way": 2.0}))
    assert mmrec("train", novel, *SMALL, "--minutes=0.2") == 0
    assert last("novel")["global_step"] > first
    assert record()["half_way"] != 2.0  # it was that of the shorter training


def test_other_minutes_than_before_count_where_it_was_stopped(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL]
    assert mmrec(*line, "--minutes=0.2", "--trainer.max_steps=8") == 0
    before = record()
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(before | {"finished": False}))
    capsys.readouterr()
    assert mmrec(*line, "--plan") == 0  # without a number the earlier one holds
    assert "instead of" not in capsys.readouterr().out
    assert mmrec(*line, "--minutes=3", "--plan") == 0
    assert "are done; 3 minutes instead of 0.2: " in capsys.readouterr().out
    assert not record()["finished"]
    assert mmrec(*line, "--minutes=3", "--trainer.max_steps=40") == 0
    assert "3 minutes instead of 0.2\n" in capsys.readouterr().out  # how many updates it has by hand nobody knows
    after = record()
    dropouts = [value_of(each["options"], "--model.dropout") for each in (before, after)]
    assert dropouts == ["0.0", "0.1"]  # as of a training that long
    assert (before["asked"], after["asked"]) == (0.2, 3)
    assert after["minutes"] == pytest.approx(before["minutes"] + 2.8)
    assert last("novel")["global_step"] == 40


def test_where_other_minutes_count_so_does_what_is_expected_of_them(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL]
    assert mmrec(*line, "--minutes=0.2", "--trainer.max_steps=8") == 0
    stopped = record() | {"finished": False, "expected": 4.0}
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(stopped))
    capsys.readouterr()
    monkeypatch.setattr(command, "run_lightning", lambda *_: None)
    assert mmrec(*line, "--minutes=3") == 0
    said, expected = capsys.readouterr().out, record()["expected"]
    assert f"are done; 3 minutes instead of 0.2: {expected:.2f} bits/byte are expected\n" in said
    assert f"; {expected:.3f} were expected\n" in said
    assert expected != 4.0


def test_another_device_than_before_counts_where_it_was_stopped(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL]
    assert mmrec(*line, "--trainer.max_steps=4") == 0
    before = record()
    assert "--trainer.accelerator=auto" in before["options"]
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(before | {"finished": False}))
    capsys.readouterr()
    assert mmrec(*line, "--on=cpu", "--plan") == 0
    assert "on          cpu instead of auto\n" in capsys.readouterr().out
    assert mmrec(*line, "--on=cpu", "--trainer.max_steps=6") == 0
    assert "--trainer.accelerator=cpu" in record()["options"]
    assert "--trainer.accelerator=auto" not in record()["options"]
    assert "accelerator: cpu" in Path("lightning_logs/novel/config.yaml").read_text(encoding="utf-8")
    assert last("novel")["global_step"] == 6
    capsys.readouterr()
    assert mmrec(*line, "--plan") == 0  # without a device the earlier one holds
    assert "instead of" not in capsys.readouterr().out


def test_stopped_and_typed_again_it_ends_as_if_it_had_not_been(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mmrec.training.callbacks.checkpointing import LastCheckpoint

    line = ["train", novel, *SMALL, "--trainer.max_steps=8"]
    assert mmrec(*line, "--run=whole") == 0
    batches, before = 0, LastCheckpoint.on_train_batch_end

    def interrupt(self: LastCheckpoint, *args: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            os.kill(os.getpid(), signal.SIGINT)
        before(self, *args)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", interrupt)
    assert mmrec(*line) == 130
    assert not record()["finished"]
    assert "Resume with: mmrec " in capfd.readouterr().err
    assert mmrec(*line) == 0
    assert "resumed" in capfd.readouterr().out
    whole, stopped = last("whole"), last("novel")
    assert stopped["global_step"] == 8
    assert all(whole["state_dict"][name].equal(stopped["state_dict"][name]) for name in whole["state_dict"])


def test_after_the_training_a_signal_ends_the_command_as_before_it(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    before, while_scoring = handlers(), list[Any]()

    def stopped(*_: object) -> tuple[float, str]:
        while_scoring.extend(handlers())
        raise KeyboardInterrupt

    line = ["train", novel, *SMALL, "--trainer.max_steps=2"]
    with monkeypatch.context() as patched:
        patched.setattr(command, "report", stopped)
        assert mmrec(*line) == 130
    assert while_scoring == before
    assert not record()["finished"]  # the same line says what came of it
    assert mmrec(*line) == 0
    assert record()["finished"]
    assert last("novel")["global_step"] == 2


def test_a_text_that_has_changed_is_trained_on_by_a_run_of_its_own(
    mmrec: Command, novel: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=1") == 0
    novel.write_text(f"{text} and more", encoding="utf-8")
    capsys.readouterr()
    assert mmrec("train", novel, "--plan") == 2
    assert capsys.readouterr().err.strip() == (
        "mmrec: error: data/novel: already holds another corpus, split or tokenizer; "
        "give another --run to train beside it, or move that folder and its run away"
    )
    second = ["train", novel, *SMALL, "--run=second"]
    assert mmrec(*second, "--trainer.max_steps=1") == 0
    assert mmrec(*second, "--trainer.max_steps=2") == 0
    assert "longer      " in capsys.readouterr().out
    assert [last(run)["global_step"] for run in ("novel", "second")] == [1, 2]
    Path("data/novel").rename("data/old")
    assert mmrec(*second, "--trainer.max_steps=3") == 0  # also where the folder of its name is free now
    assert last("second")["global_step"] == 3
    novel.write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert mmrec(*second) == 2
    assert "data/second: already holds another corpus" in capsys.readouterr().err
    assert mmrec("train", novel, "--plan") == 0
    novel.write_text(f"{text} and more and more", encoding="utf-8")
    capsys.readouterr()
    assert mmrec("train", novel, *SMALL, "--run=novel") == 2  # a run of another text is no place for it
    assert "data/novel: already holds another corpus" in capsys.readouterr().err
    Path("other.txt").write_text(text[:6000], encoding="utf-8")
    assert mmrec("train", "other.txt", *SMALL, "--run=third", "--trainer.max_steps=1") == 0
    capsys.readouterr()
    assert mmrec("train", novel, *SMALL, "--run=third") == 2
    assert "data/novel: already holds another corpus" in capsys.readouterr().err
    assert not Path("data/third").exists()


def test_a_run_of_another_text_is_no_run_of_the_one_that_took_its_folder(
    mmrec: Command, novel: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL, "--tokenizer=bytes", "--trainer.max_steps=1"]
    assert mmrec(*line) == 0
    Path("data/novel").rename("data/before")
    novel.write_text(text[::-1], encoding="utf-8")
    capsys.readouterr()
    for more in ([], ["--plan"], ["--minutes=20"]):
        assert mmrec(*line, *more) == 2
        assert capsys.readouterr().err.strip() == (
            "mmrec: error: the run 'novel' was trained on another text than data/novel holds now; "
            "choose another --run, or move lightning_logs/novel away"
        )
    assert last("novel")["global_step"] == 1
    assert mmrec(*line, "--run=second") == 0
    Path("lightning_logs/novel").rename("lightning_logs/before")
    assert mmrec(*line) == 0
    assert "longer      " not in capsys.readouterr().out
    # A record of before this was kept is believed.
    kept = record()
    del kept["tokens"]
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(kept))
    assert mmrec(*line, "--plan") == 0
    assert "longer      " in capsys.readouterr().out


def test_a_limit_that_was_reached_before_the_stop_is_told(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=3") == 0
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(record() | {"finished": False}))
    for most, told in ((2, True), (3, True), (4, False)):
        capsys.readouterr()
        assert mmrec("train", novel, f"--trainer.max_steps={most}", "--plan") == 0
        said = capsys.readouterr().out
        assert "resumed     " in said
        assert (f"--trainer.max_steps {most} leaves no more updates than the 3 that were made" in said) == told


def damage(name: str) -> None:
    path = Path("lightning_logs/novel/checkpoints", name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_it_is_trained_for_longer_from_the_last_checkpoint_where_the_stable_one_is_damaged(
    mmrec: Command, novel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=8") == 0
    Path("lightning_logs/novel/checkpoints/stable.ckpt").write_bytes(
        Path("lightning_logs/novel/checkpoints/last.ckpt").read_bytes()
    )
    damage("stable.ckpt")
    capfd.readouterr()
    assert mmrec("train", novel, *SMALL, "--trainer.max_steps=12") == 0
    assert capfd.readouterr().err.count("taking last.ckpt instead") == 1
    assert last("novel")["global_step"] == 12


def test_it_goes_on_from_the_previous_checkpoint_where_the_last_is_damaged(
    mmrec: Command, novel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["train", novel, *SMALL, "--trainer.val_check_interval=4"]
    assert mmrec(*line, "--trainer.max_steps=8") == 0
    Path("lightning_logs/novel/plan.json").write_text(json.dumps(record() | {"finished": False}))
    damage("last.ckpt")
    capfd.readouterr()
    assert mmrec(*line, "--trainer.max_steps=12") == 0
    assert capfd.readouterr().err.count("previous.ckpt instead") == 1
    assert last("novel")["global_step"] == 12


def test_a_plan_of_which_nothing_came_is_made_anew(
    mmrec: Command, novel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Record(str(Path("data/novel").resolve()), 1.0, 7, ["--trainer.max_steps=7"], 1.0, 1.0, asked=1.0).write(
        Path("lightning_logs/novel")
    )
    assert mmrec("train", novel, "--plan", "--minutes=60") == 0
    said = capsys.readouterr().out
    assert "expected    " in said
    assert "resumed" not in said


def test_a_second_command_for_the_same_text_leaves_the_plan_of_the_first(
    mmrec: Command, novel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, held = Record("elsewhere", 1.0, 7, [], 1.0, 1.0), []

    def measure(text: Text, *_: object) -> list[Rate]:
        held.append(lock_run(Path(), "novel"))  # as another process that begins to train while this one plans
        first.write(Path("lightning_logs/novel"))
        return [Rate(Candidate.of(SHAPES[0], text), 3000.0)]

    monkeypatch.setattr(command, "measure_rates", measure)
    assert mmrec("train", novel, *SMALL) == 2
    assert "is being trained by another process" in capsys.readouterr().err
    assert read_record(Path("lightning_logs/novel")) == first


@pytest.mark.parametrize(("on", "processes", "steps"), [("cpu", "2", 7), ("gpu", "1", None)])
def test_processes_are_kept_on_a_device_of_another_name(
    monkeypatch: pytest.MonkeyPatch, on: str, processes: str, steps: int | None
) -> None:
    monkeypatch.setattr(command, "device_of_accelerator", lambda name: name == "gpu")
    options = ["--trainer.accelerator=auto", "--trainer.devices=2", "--trainer.strategy=cores"]
    moved = command._move(Record("data", 1.0, 7, options, 1.0, 1.0), on)
    assert value_of(moved.options, "--trainer.accelerator") == on
    assert value_of(moved.options, "--trainer.devices") == processes
    assert moved.steps == steps


def test_another_run_of_that_name_is_left_alone(
    mmrec: Command, novel: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    assert mmrec(*fit(prepared, "--run=novel", "--trainer.max_steps=1", "--trainer.logger=false")) == 0
    before = last("novel")["global_step"]
    assert mmrec("train", novel, *SMALL) == 2
    assert "choose another --run" in capsys.readouterr().err
    assert last("novel")["global_step"] == before


def test_a_project_that_was_moved_goes_on(
    mmrec: Command, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Path("novel.txt").write_text(text, encoding="utf-8")
    assert mmrec("train", "novel.txt", *SMALL, "--trainer.max_steps=2") == 0
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    capsys.readouterr()
    assert mmrec("train", "novel.txt", *SMALL, "--trainer.max_steps=4") == 0
    assert "longer      " in capsys.readouterr().out
    assert last("novel")["global_step"] == 4
    assert not project.exists()
