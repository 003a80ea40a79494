"""EleutherAI's lm-evaluation-harness runs on an export, without a network, and measures what we measure."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from helpers import checkpoints, fit

from mmrec.checkpoint import Trained, load_trained
from mmrec.memory import Memory
from mmrec.reading import read_on

Command = Callable[..., int]
CHOICES = 40


def nats(trained: Trained, text: str) -> list[float]:
    """Return what each token of ``text`` but the first costs."""
    parts = [part for part, _ in read_on(trained.net, trained.tokenizer.encode(text), Memory.empty(trained.net))]
    return torch.cat(parts)[1:].tolist()


def questions(text: str) -> list[dict[str, Any]]:
    """Return places of ``text``, each with what follows there and what follows elsewhere."""
    choose = random.Random(0)
    asked = []
    for _ in range(CHOICES):
        at, other = choose.sample(range(20, len(text) - 20), 2)
        right = choose.randrange(2)
        choices = [text[other : other + 12]] * 2
        choices[right] = text[at : at + 12]
        asked.append({"before": text[at - 20 : at], "choices": choices, "right": right})
    return asked


def answer(trained: Trained, question: dict[str, Any]) -> int:
    before = question["before"]
    costs = [sum(nats(trained, before + choice)[len(before) - 1 :]) for choice in question["choices"]]
    return costs.index(min(costs))


@pytest.mark.slow
def test_the_documentation_s_tasks_give_our_figures(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=3", "--run=a")) == 0
    assert mmrec("export", "--format=hf", "--output_dir=out/hf") == 0
    trained = load_trained(checkpoints("a") / "best.ckpt")
    text = (prepared / "val.txt").read_text(encoding="utf-8")
    texts, asked = [text[:1500], text[1500:1900]], questions(text)

    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    tasks = Path("tasks")
    tasks.mkdir()
    for task in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        (tasks / f"{task.split()[1]}.yaml").write_text(task, encoding="utf-8")
    lines = {"texts": [{"text": one} for one in texts], "choices": asked}
    for name, rows in lines.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    (command,) = re.findall(r"^lm_eval (.*?\\\n.*?)$", page, re.MULTILINE)
    assert trained.tokenizer.encode("\n").tolist() == [0]  # as the command says
    own = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *shlex.split(command.replace("\\\n", " "))],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = Path().glob("results*.json")
    results = json.loads(found.read_text(encoding="utf-8"))["results"]

    bits = sum(sum(nats(trained, "\n" + one)) for one in texts) / math.log(2)
    expected = bits / sum(len(one.encode()) for one in texts)
    assert results["bits"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    right = sum(answer(trained, question) == question["right"] for question in asked)
    assert results["next"]["acc,none"] == pytest.approx(right / CHOICES)
    assert right > 0.6 * CHOICES  # the model has learned something
