"""Which run, which checkpoint and which config a command works on: one decision, as a table of cases."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import checkpoints, fit, last
from processes import start

from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY, PROGRESS_KEY
from mmrec.core.errors import UserError
from mmrec.model import ModelConfig
from mmrec.training.run_plan import RunPlan, RunRequest, plan_run, read_request
from mmrec.training.slurm import Job, current_job

CONFIG = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24)


def write(path: Path, with_training: bool = True) -> None:
    """Write a checkpoint that has all that a plan looks at."""
    content: dict[str, Any] = {
        MODEL_KEY: {"version": 2, "shape": CONFIG.as_dict(), "tokenizer": {}},
        "global_step": 1,
    }
    content["state_dict"] = {"weight": torch.zeros(3)}
    if with_training:
        content[PROGRESS_KEY] = {"hyperparameters": {}, "carried": {}, "random": []}
        content["TextDataModule"] = {"data_dir": "data/mine", "corpus": "tiny_shakespeare"}
    write_checkpoint(content, path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs a and b, b the latest, the run c in another root, and models that are of no run."""
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate(("lightning_logs/a", "lightning_logs/b", "other/lightning_logs/c")):
        folder = Path(run, "checkpoints")
        for name in ("best", "last", "previous"):
            write(folder / f"{name}.ckpt")
            os.utime(folder / f"{name}.ckpt", (number, number))
        (folder.parent / "config.yaml").write_text("run: old\ntrainer:\n  default_root_dir: nowhere\n")
    write(Path("model.ckpt"), with_training=False)
    write(Path("alone.ckpt"))
    Path("config.yaml").write_text("run: mine\ntrainer: {default_root_dir: other}\nckpt_path: null\n")
    return tmp_path


A, B, C = (Path(f"{run}/checkpoints") for run in ("lightning_logs/a", "lightning_logs/b", "other/lightning_logs/c"))
OWN = {"a": A.parent / "config.yaml", "b": B.parent / "config.yaml", "c": C.parent / "config.yaml"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a new run": ("fit", {"run": "version_0", "is_named": False}),
    "a new run of a name": ("fit --run n", {"run": "n"}),
    "a name in two words, and the last one counts": ("fit --run=m --run n", {"run": "n"}),
    "a name in a config": ("fit -c config.yaml", {"run": "mine", "root": Path("other")}),
    "a name after a config": ("fit --config=config.yaml --run n", {"run": "n", "root": Path("other")}),
    "a name before a config": ("fit --run n -c config.yaml", {"run": "mine", "root": Path("other")}),
    "no name, said so": ("fit --run=", {"run": "version_0", "is_named": False}),
    "the latest run": ("fit --ckpt_path last", {"run": "b", "checkpoint": B / "last.ckpt", "config": OWN["b"]}),
    "a run by name": (
        "fit --run a --ckpt_path=best",
        {"run": "a", "checkpoint": A / "best.ckpt", "config": OWN["a"]},
    ),
    "with a config of its own": (
        "fit --run a --ckpt_path last -c tiny.yaml",
        {"run": "a", "checkpoint": A / "last.ckpt"},
    ),
    "a run by its folder": (
        "validate --ckpt_path lightning_logs/a",
        {"run": "a", "checkpoint": A / "best.ckpt", "config": OWN["a"]},
    ),
    "a run that was moved": (
        "fit --ckpt_path other/lightning_logs/c/checkpoints/last.ckpt",
        {
            "run": "c",
            "root": "other",
            "checkpoint": C / "last.ckpt",
            "config": OWN["c"],
        },
    ),
    "from another root to this one": (
        "fit --ckpt_path other/lightning_logs/c/checkpoints/last.ckpt --trainer.default_root_dir=.",
        {
            "run": "version_0",
            "is_named": False,
            "checkpoint": C / "last.ckpt",
            "config": OWN["c"],
        },
    ),
    "a branch": (
        "fit --ckpt_path lightning_logs/a/checkpoints/last.ckpt --run n",
        {"run": "n", "checkpoint": A / "last.ckpt", "config": OWN["a"]},
    ),
    "of no run": (
        "fit --ckpt_path alone.ckpt --data.data_dir t",
        {"run": "version_0", "is_named": False, "checkpoint": Path("alone.ckpt"), "architecture": True},
    ),
    "of no run, with an architecture": (
        "fit --ckpt_path alone.ckpt --data.corpus=sample --model.config.dim=3",
        {"run": "version_0", "is_named": False, "checkpoint": Path("alone.ckpt")},
    ),
    "a model to score": (
        "validate --ckpt_path model.ckpt --data={data_dir:t}",
        {"run": "version_0", "is_named": False, "checkpoint": Path("model.ckpt"), "architecture": True},
    ),
    "the weights of a model": (
        "fit --init_from model.ckpt --run n",
        {"run": "n", "init_from": Path("model.ckpt"), "architecture": True},
    ),
    "the weights of the latest run": (
        "fit --init_from last --run n",
        {"run": "n", "init_from": B / "last.ckpt", "architecture": True},
    ),
    "resuming needs no weights": (
        "fit --run a --ckpt_path last --init_from gone.ckpt",
        {"run": "a", "checkpoint": A / "last.ckpt", "config": OWN["a"]},
    ),
}


def plan(command: str, job: Job | None = None) -> RunPlan:
    name, *args = command.split()
    return plan_run(read_request(name, args, job))


@pytest.mark.parametrize("case", CASES)
def test_a_plan(case: str, here: Path) -> None:
    command, expected = CASES[case]
    found = dataclasses.asdict(plan(command))
    found["architecture"] = found["architecture"] is not None
    for field in ("root", "config"):
        if found[field] is not None:
            found[field] = found[field].absolute()
            expected = {**expected, field: Path(expected.get(field, ".")).absolute()}
    nothing = dict.fromkeys(("checkpoint", "damaged", "init_from", "config"))
    assert found == nothing | {"architecture": False, "is_named": True} | expected


REFUSED = {
    "fit --run a": "the run 'a' already exists",
    "fit --run a/b": "must be the name of a folder",
    "fit --run ..": "must be the name of a folder",
    "validate": "nothing to validate",
    "validate --run a": "nothing to validate",
    "fit --ckpt_path last --run nobody": "no checkpoint of a run 'nobody'",
    "fit --ckpt_path gone.ckpt": "gone.ckpt: no such checkpoint",
    "fit --ckpt_path model.ckpt": "no training to resume",
    "fit --ckpt_path lightning_logs/a/checkpoints/last.ckpt --run b": "the run 'b' already exists",
    "fit --init_from gone": "gone: no such checkpoint",
    "fit --ckpt_path alone.ckpt": "name the token folder by --data.data_dir .it was trained on data/mine.",
    "predict --ckpt_path model.ckpt --data.batch_size=2": "name the token folder by --data.data_dir$",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_done_is_refused(command: str, here: Path) -> None:
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=REFUSED[command]):
        plan(command)
    assert sorted(here.rglob("*")) == before


def test_the_previous_checkpoint_takes_the_place_of_a_damaged_one(here: Path) -> None:
    last = A / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-9])
    found = plan("fit --run a --ckpt_path last")
    assert (found.checkpoint, found.damaged) == (A / "previous.ckpt", last.absolute())


def test_a_slurm_job_has_a_run_of_its_own_and_resumes_it(here: Path) -> None:
    assert plan("fit", Job("7")).run == "slurm_7"
    assert plan("fit --run n", Job("7")).run == "n"
    assert plan("fit", Job("7", restarted=True)).checkpoint is None  # it was stopped before it saved
    write(Path("lightning_logs/slurm_7/checkpoints/last.ckpt"))
    found = plan("fit", Job("7", restarted=True))
    assert (found.run, found.checkpoint) == ("slurm_7", Path("lightning_logs/slurm_7/checkpoints/last.ckpt"))
    assert plan("validate --run a --ckpt_path best", Job("7")).run == "a"
    variables = {
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "1",
    }
    assert current_job(variables) == Job("7_2", restarted=True)
    assert current_job({}) is None


def test_a_new_name_is_none_that_is_taken(here: Path) -> None:
    assert plan_run(RunRequest("fit"), {"version_0", "version_1"}).run == "version_2"


@pytest.mark.parametrize("case", CASES)
def test_other_processes_come_to_the_same_plan(case: str, here: Path) -> None:
    command, *args = CASES[case][0].split()
    first = plan_run(read_request(command, args))
    other = plan_run(read_request(command, first.for_other_processes(args)))
    assert (other.root.resolve(), other.run) == (first.root.resolve(), first.run)
    for one, theirs in ((first.checkpoint, other.checkpoint), (first.init_from, other.init_from)):
        assert (one and one.resolve()) == (theirs and theirs.resolve())
    assert other.architecture == first.architecture
    assert (other.config and other.config.resolve()) == (first.config and first.config.resolve())


def test_what_the_plan_adds_to_the_arguments(here: Path) -> None:
    assert plan("fit --run a --ckpt_path last").complete(["x"]) == ["--config", str(OWN["a"]), "x"]
    assert plan("fit --init_from model.ckpt").complete(["x"])[1].startswith("--model.config={")


def test_a_run_whose_folder_was_moved_is_resumed_where_it_is(mmrec: Command, prepared: Path) -> None:
    short = ["--data.seq_len=256", "--trainer.default_root_dir=before"]
    assert mmrec(*fit(prepared, *short, "--trainer.max_epochs=1", "--run=a")) == 0
    Path("before").rename("after")
    path = checkpoints("a", Path("after")) / "last.ckpt"
    assert mmrec("fit", f"--ckpt_path={path}", "--trainer.max_epochs=2") == 0
    assert last("a", Path("after"))["global_step"] == 42
    assert mmrec("fit", f"--ckpt_path={path}", "--trainer.max_epochs=3", "--run=branch") == 0
    assert last("branch", Path("after"))["global_step"] == 63
    assert not Path("before").exists()
    assert not Path("lightning_logs").exists()


@pytest.mark.slow
def test_runs_without_a_name_may_begin_at_the_same_moment(prepared: Path, tmp_path: Path) -> None:
    command = fit(prepared, "--data.seq_len=256", "--trainer.max_epochs=1")
    processes: list[Any] = [start(tmp_path, command) for _ in range(3)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0, 0], (tmp_path / "output.txt").read_text()[-2000:]
    for number in range(3):
        assert last(f"version_{number}", tmp_path)["global_step"] == 21


def test_a_resumed_run_reads_its_checkpoint_once_for_its_hash(
    mmrec: Command, small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.checkpoints import checkpoint as module

    shutil.copytree(small_root / "lightning_logs", "lightning_logs")
    verified: list[str] = []
    verify = module.verify_checksum

    def verify_and_count(path: Path) -> None:
        verified.append(path.name)
        verify(path)

    monkeypatch.setattr(module, "verify_checksum", verify_and_count)
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert verified == ["last.ckpt"]
    assert mmrec("validate", "--run=a", "--ckpt_path=best", "--trainer.limit_val_batches=1") == 0
    assert verified == ["last.ckpt", "best.ckpt"]


def test_what_decides_on_the_run_is_not_hidden_in_a_group(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = '--trainer={"default_root_dir": "elsewhere"}'
    assert mmrec(*fit(prepared, hidden, "--trainer.max_steps=1")) == 2
    assert "give --trainer.default_root_dir by its own name" in capsys.readouterr().err
