"""EleutherAI's lm-evaluation-harness on the tasks of the documentation, and what their figures ought to be."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState
from mmrec.inference.reading import iter_nll

CHOICES = 40


def nats(trained: LoadedModel, text: str) -> list[float]:
    """Return what each token of ``text`` but the first costs."""
    parts = [part for part, _ in iter_nll(trained.net, trained.tokenizer.encode(text), SavedState.empty(trained.net))]
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


def costs(trained: LoadedModel, question: dict[str, Any]) -> list[float]:
    """Return what each choice costs after what stands before it."""
    before = question["before"]
    return [sum(nats(trained, before + choice)[len(before) - 1 :]) for choice in question["choices"]]


class Harness:
    """The two tasks of docs/export.md in the current folder, on a text.

    Args:
        trained: the model, by characters, of which "\\n" is the first.
        text: to ask about.
        home: of the harness' caches.
    """

    def __init__(self, trained: LoadedModel, text: str, home: Path) -> None:
        assert trained.tokenizer.encode("\n").tolist() == [0]  # as the commands say
        self.trained, self.home = trained, home
        self.texts, self.questions = [text[:1500], text[1500:1900]], questions(text)
        page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
        tasks = Path("tasks")
        tasks.mkdir()
        for task in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
            (tasks / f"{task.split()[1]}.yaml").write_text(task, encoding="utf-8")
        lines: dict[str, list[Any]] = {"texts": [{"text": one} for one in self.texts], "choices": self.questions}
        for name, rows in lines.items():
            content = "".join(json.dumps(row) + "\n" for row in rows)
            (tasks / f"{name}.jsonl").write_text(content, encoding="utf-8")

    def run(self, page: str, *more: str, port: int = 8000) -> dict[str, dict[str, float]]:
        """Run the command that ``page`` of the documentation shows, on a server at ``port`` where it is about one.

        Returns:
            The figures of each task by their names.
        """
        shown = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        (command,) = re.findall(r"^lm_eval ((?:.*\\\n)+.*)$", shown, re.MULTILINE)
        command = command.replace(":8000/", f":{port}/")
        own = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.home)}
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *shlex.split(command.replace("\\\n", " ")), *more],
            env=os.environ | own,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (found,) = Path().glob("results*.json")
        results: dict[str, dict[str, float]] = json.loads(found.read_text(encoding="utf-8"))["results"]
        return results

    def expected(self) -> tuple[float, float]:
        """Return the bits per byte of the texts, and how many questions of all are answered rightly."""
        bits = sum(sum(nats(self.trained, "\n" + one)) for one in self.texts) / math.log(2)
        answers = [costs(self.trained, question) for question in self.questions]
        right = sum(
            cost.index(min(cost)) == question["right"] for cost, question in zip(answers, self.questions, strict=True)
        )
        return bits / sum(len(one.encode()) for one in self.texts), right / CHOICES
