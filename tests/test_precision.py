"""Where nothing is asked for, matrices are multiplied in what the processor has units for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import fit

from mmrec.core.runtime import native_precision

Command = Callable[..., int]


def has(monkeypatch: pytest.MonkeyPatch, cuda: bool, **units: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)


@pytest.mark.parametrize(
    ("accelerator", "cuda", "units", "expected"),
    [
        ("cpu", False, {"avx512_bf16": True}, "bf16-mixed"),
        ("cpu", True, {"amx_bf16": True}, "bf16-mixed"),
        ("auto", False, {"avx2": True, "avx512_bf16": False}, "32-true"),
        ("cpu", True, {}, "32-true"),
        ("auto", True, {}, "bf16-mixed"),
        ("gpu", True, {}, "bf16-mixed"),
        ("tpu", False, {"avx512_bf16": True}, "32-true"),
    ],
)
def test_the_precision_that_a_machine_has(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool, units: dict[str, bool], expected: str
) -> None:
    has(monkeypatch, cuda, **units)
    assert native_precision(accelerator) == expected


def saved_precision(run: str) -> str:
    config = yaml.safe_load(Path(f"lightning_logs/{run}/config.yaml").read_text())
    return str(config["trainer"]["precision"])


@pytest.mark.parametrize(("units", "expected"), [({"avx512_bf16": True}, "bf16-mixed"), ({}, "32-true")])
def test_a_run_takes_it_and_writes_it_down(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: str
) -> None:
    has(monkeypatch, False, **units)
    assert mmrec(*fit(prepared, "--trainer.max_steps=2", "--run=native")) == 0
    assert saved_precision("native") == expected


def test_what_is_asked_for_is_done(mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, False, avx512_bf16=True)
    assert mmrec(*fit(prepared, "--trainer.max_steps=2", "--run=full", "--trainer.precision=32-true")) == 0
    assert saved_precision("full") == "32-true"
