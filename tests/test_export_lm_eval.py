"""EleutherAI's lm-evaluation-harness runs on an export, without a network, and measures what we measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command
from harness import Harness
from helpers import checkpoints, fit

from mmrec.checkpoints.loading import load_model


@pytest.mark.slow
def test_the_documentation_s_tasks_give_our_figures(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=3", "--run=a")) == 0
    assert mmrec("export", "--format=hf", "--output_dir=out/hf") == 0
    trained = load_model(checkpoints("a") / "best.ckpt")
    harness = Harness(trained, (prepared / "val.txt").read_text(encoding="utf-8"), tmp_path / "home")
    results = harness.run("export.md")
    bits, right = harness.expected()
    assert results["bits"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert results["next"]["acc,none"] == pytest.approx(right)
    assert right > 0.6  # the model has learned something
