"""``scripts/gpu_day.py``: every stage rehearsed at a toy size on the simulated device, and its limits."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from conftest import REPOSITORY

from mmrec.bench import gpu_stages
from mmrec.bench.gpu_stages import STAGES, Day
from mmrec.core.errors import UserError
from mmrec.core.runtime import configure

_spec = importlib.util.spec_from_file_location("gpu_day", REPOSITORY / "scripts" / "gpu_day.py")
assert _spec is not None
assert _spec.loader is not None
gpu_day = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_day)


@pytest.mark.simulated_cuda
def test_every_stage_is_rehearsed(prepared: Path, tmp_path: Path) -> None:
    configure()  # as the script does
    day = Day("cuda", tmp_path / "results", prepared, toy=True, seconds=0)
    day.folder.mkdir()
    found = {name: gpu_day.run_stage(name, day) for name in STAGES}
    for row in found["ops"]:
        assert row["same_bits"]
        assert max(row["outputs"], row["gradients"]) < (2e-2 if row["precision"] == "bfloat16" else 1e-5), row
        assert not row["kernels"]  # the device is not one
    (resumed,) = found["resume"]
    assert resumed["same_bits"]
    assert resumed["loss_on_cpu"] == pytest.approx(resumed["loss_here"], abs=1e-4)
    speeds = {(row["model"], row["length"]): row for row in found["speed"]}
    assert all(speeds[name, length]["tokens_per_second"] > 0 for name in ("mmrec", "gpt") for length in (16, 32))
    assert all(speeds[name, 16]["peak_bytes"] > 0 for name in ("mmrec", "gpt"))
    decoded = [(row["rows"], row["position"], row["captured"]) for row in found["decode"]]
    assert decoded == [(*at, captured) for at in ((1, 8), (1, 24), (4, 8), (4, 24)) for captured in (True, False)]
    assert all(row["tokens_per_second"] > 0 for row in found["decode"])
    (learned,) = found["learn"]
    assert learned["updates"] == 6
    assert 0 < learned["carried_loss"] < 5
    assert [row["learns"] for row in found["read"]] == [False, True]
    for name, rows in found.items():
        kept = json.loads((day.folder / f"{name}.json").read_text())
        assert kept["rows"] == rows
        assert kept["machine"]["device"] == "cuda:0" or kept["machine"]["device"] == "cuda"


def test_a_stage_has_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["ops", "--toy", "--device=cpu", "--limit=600", f"--output_dir={tmp_path / 'out'}"]
    gpu_day.gpu_day(options)
    assert capsys.readouterr().out.strip().endswith("18 rows")
    rows = json.loads((tmp_path / "out/ops.json").read_text())["rows"]
    assert {(row["op"], row["precision"]) for row in rows} >= {("rg_lru", "tf32"), ("gated_delta_rule", "bfloat16")}


def test_a_stage_is_ended_by_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], timeout: float, **_: Any) -> None:
        (tmp_path / "speed.json").write_text('{"rows": [{}, {}]}')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    gpu_day.gpu_day(["speed", "--toy", "--device=cpu", f"--output_dir={tmp_path}", "--limit=3"])
    assert capsys.readouterr().out == "speed: ended by its limit of 3 s; 2 rows are kept\n"


def test_what_a_stage_found_is_kept_after_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(day: Day) -> Iterator[dict[str, Any]]:
        yield {"first": 1}
        raise RuntimeError("of the device")

    monkeypatch.setitem(STAGES, "ops", (broken, 60))
    with pytest.raises(RuntimeError, match="of the device"):
        gpu_day.run_stage("ops", Day("cpu", tmp_path, tmp_path))
    assert json.loads((tmp_path / "ops.json").read_text())["rows"] == [{"first": 1}]


def test_a_stage_that_fails_is_one_line_and_the_next_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], stdout: IO[str], **_: Any) -> subprocess.CompletedProcess[str]:
        stdout.write("Traceback\nRuntimeError: of the device\n")
        stdout.flush()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    gpu_day.gpu_day(["read", "learn", "--toy", "--device=cpu", f"--output_dir={tmp_path}"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"learn: failed after 0 s: RuntimeError: of the device ({tmp_path / 'learn.log'})"
    assert second.startswith("read: failed")


def test_a_model_that_is_not_here_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other rows are as they would be."""

    def broken(*_: Any) -> None:
        raise RuntimeError("of another package\nand more of it")

    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: None)
    monkeypatch.setitem(gpu_stages.MODELS, "gpt", broken)
    rows = gpu_day.run_stage("speed", Day("cpu", tmp_path, tmp_path, toy=True, seconds=0))
    found = {row["model"]: row for row in rows if row["length"] == 16}
    assert found["mmrec"]["tokens_per_second"] > 0
    assert found["gpt"]["failed"] == "RuntimeError: of another package and more of it"
    assert found["fla"]["left_out"] == "its package is not here"


def test_nothing_is_read_without_a_model(tmp_path: Path) -> None:
    assert gpu_day.run_stage("read", Day("cpu", tmp_path, tmp_path)) == [{"left_out": "no model of the stage learn"}]


def test_what_has_no_time_left_is_said(tmp_path: Path) -> None:
    day = Day("cpu", tmp_path, tmp_path, toy=True, seconds=0, deadline=time.monotonic())
    for name in ("speed", "decode"):
        rows = gpu_day.run_stage(name, day)
        assert rows
        assert all(row["left_out"] == "no time" for row in rows)


def test_all_stages_take_less_than_ten_minutes() -> None:
    assert sum(limit for _, limit in STAGES.values()) <= 580


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage 'opps'; known: ops, .*did you mean 'ops'"):
        gpu_day.gpu_day(["opps"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device is cuda: "):
            gpu_day.gpu_day([f"--output_dir={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()


def test_the_help_names_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_day.parse(["--help"])
    assert stop.value.code == 0
    assert "ops, resume, speed, decode, learn, read" in " ".join(capsys.readouterr().out.split())
