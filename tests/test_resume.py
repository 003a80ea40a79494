"""A run that was stopped ends with the same bits as one that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIGURES, REPOSITORY, Command, Figure
from helpers import assert_same_training, checkpoints, fit, last, losses
from processes import interrupt, run, start_ranks, wait

from mmrec.checkpoints.checkpoint import write_checkpoint

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

EVERYTHING = [
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=5",
    "--data.batch_size=4",
    "--data.seq_len=150",
    "--data.segment_len=300",
    "--data.interleave=2",
    "--model.config.layer_types=[short, long]",
    "--model.mtp_loss_weight=0.3",
    "--model.confidence_penalty=0.2",
    "--last.every_n_train_steps=1",
]
"""Dropout, warm-up and early stopping come with the quick model: see helpers."""
EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("plain", []), ("accumulation", ["--trainer.accumulate_grad_batches=3"]), ("average of weights", EMA)],
)
def test_from_every_saved_step(
    name: str,
    options: list[str],
    mmrec: Command,
    prepared: Path,
    figure: Figure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmrec.training.callbacks import checkpoint_io as callbacks

    saved: list[Path] = []

    def also_keep(checkpoint: dict[str, Any], target: Path, previous: Path | None = None) -> None:
        write_checkpoint(checkpoint, target, previous)
        if target.name == "last.ckpt":
            saved.append(Path(f"step_{checkpoint['global_step']}_{len(saved)}.ckpt"))
            shutil.copy(target, saved[-1])

    command = fit(prepared, *EVERYTHING, *options)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "write_checkpoint", also_keep)
        assert mmrec(*command, "--run=whole") == 0
    end, whole, scores = last("whole"), losses("whole"), losses("whole", "val/loss")
    assert end["epoch"] == 1
    assert len({path.name.split("_")[1] for path in saved}) == end["global_step"]

    folder = checkpoints("whole")
    shutil.copytree(folder, "best_at_the_end")
    every = 2 if options else 1
    tried = saved[:: every if FIGURES is not None else 12]
    for path in tried:
        shutil.rmtree(folder.parent)
        shutil.copytree("best_at_the_end", folder)
        shutil.copy(path, folder / "last.ckpt")
        assert mmrec(*command, "--run=whole", "--ckpt_path=last") == 0
        assert_same_training(end, last("whole"))
        if path != saved[-1]:
            assert losses("whole").items() <= whole.items()
            assert losses("whole", "val/loss").items() <= scores.items()
    figure(
        f"a run resumed from any saved step ends with the bits of one never stopped ({name})",
        f"{len(tried)} of {len(tried)} resumed runs equal",
    )


# Two processes


TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
LONG = ["--trainer.max_epochs=2", "--data.seq_len=64"]
"""Batches enough that Ctrl-C after the first save comes before the end, on a busy machine too."""


def saves(folder: Path, arguments: Sequence[str], wait: Callable[[float], bool]) -> None:
    """Return when the run that ``arguments`` name has saved once more, or ``wait`` of some seconds says: ended."""
    name = next(a for a in arguments if a.startswith("--run=")).removeprefix("--run=")
    path = checkpoints(name, folder) / "last.ckpt"

    def stored() -> int | None:
        return path.stat().st_ino if path.exists() else None

    before = stored()
    while stored() == before and not wait(0.02):
        pass


def interrupted(folder: Path, *arguments: str, ranks: int) -> int:
    """Run a command in ``ranks`` processes, send Ctrl-C to all when it has saved once, and return its status."""
    processes = start_ranks(folder, arguments, ranks)

    def ended(seconds: float) -> bool:
        processes[0].join(seconds)
        return not processes[0].is_alive()

    saves(folder, arguments, ended)
    interrupt(processes)
    return wait(processes)


def interrupted_where_lightning_starts_the_others(folder: Path, *arguments: str) -> int:
    """The same as it is typed: one process, which starts what else it needs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmrec", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def ended(seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is not None

    saves(folder, arguments, ended)
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(120)


def test_two_processes(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    options = [*LONG, "--last.every_n_train_steps=3", "--trainer.log_every_n_steps=1"]
    options += ["--trainer.accumulate_grad_batches=2", *EMA]
    run(tmp_path, *fit(prepared, *options, *TWO, "--run=whole"), ranks=2)
    end = last("whole", tmp_path)

    parts = fit(prepared, *options, *TWO, "--run=parts")
    assert interrupted_where_lightning_starts_the_others(tmp_path, *parts) == 130
    stopped = last("parts", tmp_path)["global_step"]
    assert 0 < stopped < end["global_step"]
    run(tmp_path, "fit", "--run=parts", "--ckpt_path=last", ranks=2)
    assert_same_training(end, last("parts", tmp_path))
    logged = losses("parts", root=tmp_path)
    assert logged.items() <= losses("whole", root=tmp_path).items()
    assert len(logged) >= end["global_step"] - 1  # the step that Ctrl-C met is saved, and not logged
    figure("the same with two processes (gloo), stopped by Ctrl-C", f"equal, stopped at step {stopped}")


def read(folder: Path) -> list[list[list[int]]]:
    """Return what was read since the last call: of every batch its rows, inputs then targets, of all processes."""
    path = folder / "read.jsonl"
    batches: dict[int, dict[int, list[list[int]]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        batch = batches.setdefault(row["step"], {})
        assert row["rank"] not in batch, "a batch was read twice"
        batch[row["rank"]] = [a + b for a, b in zip(row["inputs"], row["targets"], strict=True)]
    path.unlink()
    assert sorted(batches) == list(range(len(batches)))
    return [[row for rank in sorted(batches[step]) for row in batches[step][rank]] for step in sorted(batches)]


def test_two_processes_go_on_as_one_and_one_as_two(
    mmrec: Command, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    """The rule: rows x processes stay. The memory and the place of every row are then taken up by the others."""
    # Products in bfloat16 would differ more by the order of their sums.
    options = [*LONG, "--model.dropout=0", "--trainer.precision=32-true"]
    options += ["--last.every_n_train_steps=3", "--trainer.callbacks+=tokens_read.TokensRead"]
    run(tmp_path, *fit(prepared, *options, *TWO, "--run=whole"), ranks=2)
    expected = read(tmp_path)
    assert interrupted(tmp_path, *fit(prepared, *options, *TWO, "--run=a"), ranks=2) == 130
    stops = [last("a", tmp_path)["global_step"]]

    again = ["fit", "--run=a", "--ckpt_path=last"]
    alone = [*again, "--trainer.devices=1", "--trainer.strategy=auto"]
    assert mmrec(*alone) == 2
    assert "rows 4 there, 2 here" in capsys.readouterr().err
    assert interrupted(tmp_path, *alone, "--data.batch_size=4", ranks=1) == 130
    stops.append(last("a", tmp_path)["global_step"])
    run(tmp_path, *again, *TWO, "--data.batch_size=2", ranks=2)

    one, other = last("a", tmp_path), last("whole", tmp_path)
    assert 0 < stops[0] < stops[1] < one["global_step"] == other["global_step"]
    found = read(tmp_path)
    assert found == expected
    # The same memories, too: only the order of the sums differs.
    worst = max(float((one["state_dict"][k] - v).abs().max()) for k, v in other["state_dict"].items())
    assert worst < 1e-3
    for mine, theirs in zip(one["mmrec_progress"]["carried"][0], other["mmrec_progress"]["carried"][0], strict=True):
        assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(mine, theirs, strict=True))
    figure(
        "two processes go on as one, and one as two: no token skipped or read twice",
        f"stopped at steps {stops[0]} and {stops[1]}: the tokens of all {len(found)} batches are the same, "
        f"weights within {worst:.0e}",
    )
