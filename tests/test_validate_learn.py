"""The protocols of ``mmrec validate``: carried, windowed, and with weights that learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Command
from helpers import fit


def test_the_protocols_of_validate(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec(*fit(prepared, "--run=a", "--trainer.max_epochs=1")) == 0
    losses = {}
    for option in ((), ("--window", 16), ("--learn",)):
        capsys.readouterr()
        assert mmrec("validate", "--run=a", "--ckpt_path=best", *option) == 0
        found = re.search(r"validation \((.*?), .*: ([\d.]+) nats/token", capsys.readouterr().out)
        assert found
        losses[found[1]] = float(found[2])
    assert losses["learned"] < losses["carried"] < losses["windowed at 16"]
    assert mmrec("validate", "--run=a", "--ckpt_path=best", "--window=0") == 2
    assert mmrec("validate", "--run=a", "--ckpt_path=best", "--window=8", "--learn") == 2
    assert "not both" in capsys.readouterr().err
