"""kill -9 at any moment, Ctrl-C, Slurm, and disks that take no more: nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIGURES, Figure
from helpers import assert_same_training, checkpoints, fit, last
from processes import start, wait
from victim import STAGES, Moment, die, lift_file_size, limit_file_size, linger, obey_permissions

from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.core.errors import UserError

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

KILLS, EPOCHS, SAVES = (8, 2, 6) if FIGURES is None else (30, 6, 10)
"""How often a run is killed, how long it is, and how many of the kills are inside a save: in each of its stages."""
OPTIONS = [
    "--trainer.max_epochs=1",
    "--trainer.val_check_interval=10",
    "--data.batch_size=4",
    "--data.seq_len=60",
    "--model.config.layer_types=[short, long]",
    "--last.every_n_train_steps=2",
    "--run=a",
]


def end(folder: Path, arguments: list[str], prepare: Callable[..., None] | None = None, *more: object) -> int:
    """Run a training in a process of its own and return its exit status, negative for a signal."""
    return wait([start(folder, arguments, prepare, *more)])


def moments(seed: int) -> list[Moment]:
    """Return where to kill: inside every stage of a save, the others anywhere in or between updates."""
    draw = random.Random(seed)
    stages = [STAGES[number % len(STAGES)] for number in range(SAVES)] + ["step"] * (KILLS - SAVES)
    draw.shuffle(stages)
    return [
        (stage, draw.randint(1, 7), draw.random() * 0.03)
        if stage == "step"
        else (stage, draw.randint(2, 4), draw.random())
        for stage in stages
    ]


@pytest.fixture(params=["one file system", "two file systems"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the run is kept: beside temporary files, or on another file system than those."""
    if request.param == "one file system":
        yield tmp_path
        return
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at hand")
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


def test_killed_at_any_moment(
    prepared: Path, tmp_path: Path, root: Path, figure: Figure, request: pytest.FixtureRequest
) -> None:
    command = fit(prepared, *OPTIONS, f"--trainer.max_epochs={EPOCHS}", f"--trainer.default_root_dir={root}")
    assert end(tmp_path, command) == 0
    expected = last("a", root)
    shutil.rmtree(checkpoints("a", root).parent)

    folder = checkpoints("a", root)
    survived = inside = 0
    for moment in moments(seed="two" in request.node.name):
        begun = (folder / "last.ckpt").exists()
        status = end(tmp_path, [*command, "--ckpt_path=last"] if begun else command, die, moment)
        assert status == -signal.SIGKILL, (moment, (tmp_path / "output.txt").read_text()[-2000:])
        if begun:
            assert read_checkpoint(find_intact_checkpoint(folder / "last.ckpt"))["global_step"] > 0
        survived += 1
        inside += moment[0] != "step"
        assert (
            len(list(folder.iterdir() if folder.exists() else [])) <= 5
        )  # best, last, previous, what two cut-off saves left
    assert last("a", root)["global_step"] < expected["global_step"], "the run ended before the last kill"
    assert end(tmp_path, [*command, "--ckpt_path=last"]) == 0
    assert_same_training(expected, last("a", root))
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    figure(
        f"kill -9 at seeded moments ({request.node.callspec.id}): a checkpoint loads, the end is the same to the bit",
        f"{survived} of {KILLS} kills survived, {inside} of them inside a save; bytes lost: 0",
    )


# Signals


def wait_for(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.is_alive(), (path, "the training ended")
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_second_ctrl_c_stops_at_once(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    process: Any = start(tmp_path, fit(prepared, *OPTIONS), linger, 7, 60.0)
    wait_for(tmp_path / "lingering", process)
    before = {path: path.read_bytes() for path in checkpoints("a", tmp_path).iterdir()}
    assert before
    assert end(tmp_path, ["fit", "--run=a", "--ckpt_path=last"]) == 2
    assert "the run 'a' is being trained by another process" in (tmp_path / "output.txt").read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT
    assert {path: path.read_bytes() for path in checkpoints("a", tmp_path).iterdir()} == before
    figure("a second Ctrl-C stops at once and loses no checkpoint", f"after {time.monotonic() - began:.2f} s")


def slurm(folder: str, restarts: int) -> None:
    """Make this process look like a job of Slurm, with a ``scontrol`` that writes down what it is asked."""
    Path("scontrol").write_text('#!/bin/sh\necho "$@" >>asked.txt\n')
    Path("scontrol").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    job = {"JOB_ID": "4711", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODELIST": "n1"}
    os.environ.update({f"SLURM_{key}": value for key, value in job.items()})
    os.environ["SLURM_RESTART_COUNT"] = str(restarts)


def slurm_and_linger(folder: str, step: int, seconds: float) -> None:
    slurm(folder, 0)
    linger(step, seconds)


def test_slurm_ends_the_job_and_queues_it_again(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    command = [argument for argument in fit(prepared, *OPTIONS) if argument != "--run=a"]
    assert end(tmp_path, [*command, "--run=whole"]) == 0
    process: Any = start(tmp_path, command, slurm_and_linger, str(tmp_path), 9, 2.0)
    wait_for(tmp_path / "lingering", process)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert (tmp_path / "asked.txt").read_text() == "requeue 4711\n"
    stopped = last("slurm_4711", tmp_path)["global_step"]
    assert stopped == 9

    assert end(tmp_path, command, slurm, str(tmp_path), 1) == 0
    assert_same_training(last("whole", tmp_path), last("slurm_4711", tmp_path))
    figure("Slurm's warning saves, queues the job again, and the same command goes on", "equal to the bit")


# A disk that takes no more


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    prepared: Path, tmp_path: Path, figure: Figure
) -> None:
    command = [*fit(prepared, *OPTIONS), "--trainer.logger=false"]
    assert end(tmp_path, command, limit_file_size, 5, 20_000) == 2
    said = (tmp_path / "output.txt").read_text()
    path = checkpoints("a", tmp_path).absolute() / "last.ckpt"
    assert f"mmrec: error: {path}: cannot be written" in said
    assert "Traceback" not in said
    assert read_checkpoint(path)["global_step"] == 4
    assert {p.name for p in path.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}

    assert end(tmp_path, [*command, "--ckpt_path=last"]) == 0
    resumed = last("a", tmp_path)
    shutil.rmtree(path.parent.parent)
    assert end(tmp_path, command) == 0
    assert_same_training(last("a", tmp_path), resumed)
    figure("a full disk: the path is named, the last checkpoint is whole, and the run goes on from it", "as promised")


def test_a_run_may_go_on_and_save_later(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    """The curves, which that disk does not take either, end; the training does not."""
    command = [*fit(prepared, *OPTIONS), "--trainer.log_every_n_steps=1", "--last.if_save_fails=go_on"]
    assert end(tmp_path, command, lift_file_size, 5, 4_000, 25) == 0
    said = (tmp_path / "output.txt").read_text()
    assert said.count("cannot write the curves") == 1
    assert "Traceback" not in said
    failed = said.count("training goes on, the next save tries again")
    assert failed >= 10
    resumed = last("a", tmp_path)
    shutil.rmtree(checkpoints("a", tmp_path).parent)
    assert end(tmp_path, command) == 0
    assert_same_training(last("a", tmp_path), resumed)
    figure("the run may go on where a save fails, and saves again when it can", f"{failed} saves failed, all said")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_disk(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    """A file system with room for less than two checkpoints more than the first."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        wide = "--model.config={dim: 32, layers: 1, heads: 2, ffn_dim: 24}"
        command = [*fit(prepared, *OPTIONS), "--trainer.logger=false", wide, f"--trainer.default_root_dir={small}"]
        assert end(tmp_path, command) == 2
        assert "No space left on device" in (tmp_path / "output.txt").read_text().splitlines()[-1]
        kept = [path for path in checkpoints("a", small).glob("*.ckpt") if read_checkpoint(path)]
        assert kept
        figure("a file system that is full", f"{len(kept)} checkpoints on it, all whole")
    finally:
        os.system(f"umount {small}")


def test_a_folder_without_permission(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    command, folder = fit(prepared, *OPTIONS), checkpoints("a", tmp_path)
    assert end(tmp_path, command) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o500)
    assert end(tmp_path, [*command, "--ckpt_path=last", "--trainer.max_epochs=2"], obey_permissions) == 2
    folder.chmod(0o700)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    said = (tmp_path / "output.txt").read_text()
    assert f"{folder.absolute()}/last.ckpt: cannot be written: Permission denied" in said
    assert "Traceback" not in said
    figure("a folder without permission is named, and what was saved is as it was", "byte for byte")


# Damaged files


def test_damaged_checkpoints_are_found(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    assert end(tmp_path, fit(prepared, *OPTIONS)) == 0
    good = checkpoints("a", tmp_path) / "last.ckpt"
    content, whole = good.read_bytes(), read_checkpoint(good)
    draw = random.Random(0)
    harmless = found = 0
    for number in range(400):
        if number % 4 == 0:
            bad = content[: draw.randrange(len(content))]
        else:
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            bad = bytes(flipped)
        path = tmp_path / "bad.ckpt"
        path.write_bytes(bad)
        try:
            same = read_checkpoint(path)
        except UserError as error:
            found += str(path) in str(error)
        else:  # the checksum itself was hit, and is none any more
            harmless += 1
            assert all(torch.equal(value, same["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert found + harmless == 400
    assert harmless <= 4
    figure("truncated and bit-flipped checkpoints are found", f"{found} of 400; {harmless} without effect")


def test_the_previous_checkpoint_takes_the_place_of_a_damaged_one(
    prepared: Path, tmp_path: Path, figure: Figure
) -> None:
    command = fit(prepared, *OPTIONS)
    assert end(tmp_path, command) == 0
    expected = last("a", tmp_path)
    shutil.rmtree(checkpoints("a", tmp_path).parent)
    assert end(tmp_path, command, die, ("step", 21, 0.0)) == -signal.SIGKILL
    path = checkpoints("a", tmp_path) / "last.ckpt"
    damages: tuple[Callable[[bytes], bytes], ...] = (
        lambda data: data[:-500],
        lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
    )
    for damage in damages:
        path.write_bytes(damage(path.read_bytes()))
        (tmp_path / "output.txt").unlink()
        assert end(tmp_path, [*command, "--ckpt_path=last"], die, ("step", 5, 0.0)) == -signal.SIGKILL
        assert "previous.ckpt instead" in (tmp_path / "output.txt").read_text()
    # Killed between the two renames of the first save: the damaged one has not become the previous one.
    path.write_bytes(path.read_bytes()[:-500])
    assert end(tmp_path, [*command, "--ckpt_path=last"], die, ("rename", 1, 1.0)) == -signal.SIGKILL
    assert end(tmp_path, [*command, "--ckpt_path=last"]) == 0
    assert_same_training(expected, last("a", tmp_path))
    figure("a damaged last checkpoint is said, and the run goes on from the previous one", "equal to the bit")
