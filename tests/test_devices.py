"""``--device``: names, what is not here, and what ``auto`` takes; on the simulated device see test_inference_cuda."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command
from models import SHORT_AND_LONG, content

from mmrec import MemoryLM
from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.core import devices
from mmrec.core.devices import find_device, has_float64
from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3).eval()), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize(
    "command", ["generate", "read", "score", "serve", "export", "eval carry", "bench", "eval mqar"]
)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_is_one_line(
    mmrec: Command, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, device: str
) -> None:
    (tmp_path / "text.txt").write_text("abc")
    needed = {
        "read": ["text.txt", "--save=a.mem"],
        "score": ["text.txt"],
        "serve": ["--port=0"],
        "export": ["--format=safetensors", "--output_dir=out"],
        "eval carry": ["--files=[text.txt]"],
    }
    of_model = [] if command in ("bench", "eval mqar") else [f"--ckpt={checkpoint}"]
    assert mmrec(*command.split(), *needed.get(command, []), *of_model, f"--device={device}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"mmrec: error: --device is {device}: ")
    assert line.endswith("give another, or auto for the best that works here")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", ""])
def test_a_name_of_no_device_is_one_line(mmrec: Command, capsys: pytest.CaptureFixture[str], name: str) -> None:
    for command in (["generate"], ["bench"], ["eval", "parity"]):
        assert mmrec(*command, f"--device={name}") == 2
        assert "it must be auto, cpu, cuda, mps or cuda:NUMBER" in capsys.readouterr().err


def test_the_python_api_takes_a_device(checkpoint: Path) -> None:
    assert MemoryLM.load(str(checkpoint), device="cpu").generate("a", length=3)
    with pytest.raises(UserError, match="it must be auto, cpu"):
        MemoryLM.load(str(checkpoint), device="tpu")


def test_auto_leaves_a_gpu_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "_cuda_count", lambda: 2)
    monkeypatch.setattr(devices, "_failure", lambda device: f"it does not work: {device} is too old")
    assert find_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ("cuda is here, but it does not work: cuda is too old; computing on the CPU\n")


def test_a_number_beyond_the_devices_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cuda_count", lambda: 2)
    with pytest.raises(UserError, match="there are 2 CUDA devices, from cuda:0 on"):
        find_device("cuda:2")


def test_mps_has_no_float64() -> None:
    assert not has_float64(torch.device("mps"))
    assert has_float64(torch.device("cuda", 1))
