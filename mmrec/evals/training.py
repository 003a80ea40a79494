"""Teaching a task to a model, by levels that get harder, and counting what it then has right."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mmrec.baselines.models import GPT, LSTM
from mmrec.baselines.training import optimizer_of, start
from mmrec.core.precision import MIXED, native_precision
from mmrec.evals.models import Asked, layer_parameters, make_model
from mmrec.evals.tasks import Task
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.training.optim import warmup_cosine

CHUNK = 4096
"""Tokens of a row that are read at a time in a test; beyond that only models with a state go on."""
TEST_TOKENS = 1 << 21
"""Of a test: with more than that it has fewer rows, down to a quarter of them."""
TEST_SEED = 1 << 20
"""Added to a seed for the rows of tests, which no training then draws."""


@dataclass(frozen=True)
class Recipe:
    """How a task is taught and tested; the same for every model but for the learning rate.

    Args:
        task: makes the task.
        config: of our model; the others have as many layers and parameters.
        levels: taught one after the other, in shares of the first half of all updates; then all but mostly the last.
        tests: levels tested, the taught ones and beyond.
        steps: updates.
        tokens: of an update, at least one row.
        learning_rate: of our model.
        peer_rate: of the others.
        test_rows: rows of a test.
    """

    task: Callable[[], Task]
    config: ModelConfig
    levels: Sequence[int]
    tests: Sequence[int]
    steps: int
    tokens: int = 8192
    learning_rate: float = 3e-3
    peer_rate: float = 2e-3
    test_rows: int = 256


def level_of(recipe: Recipe, step: int, random: np.random.Generator) -> int:
    """Return the level of update ``step``: half of the time the hardest that is reached, else any up to it."""
    reached = min(len(recipe.levels) - 1, 2 * step * len(recipe.levels) // recipe.steps)
    return recipe.levels[reached if random.random() < 0.5 else int(random.integers(reached + 1))]


def teach(name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Teach the recipe's task to the model ``name`` and test it.

    Returns:
        ``accuracy`` by level (None where the model cannot read so far), ``course`` of losses, ``parameters``,
        ``layer_parameters``, ``seconds``.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    random, task = np.random.default_rng(seed), recipe.task()
    longest = max(task.length(level) for level in recipe.levels)
    model = make_model(name, recipe.config, task.vocab_size, longest)
    asked = Asked(model)
    rate = recipe.learning_rate if isinstance(model, RecurrentLM) else recipe.peer_rate
    optimizer = optimizer_of(model, rate, 0.0)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, recipe.steps // 20, recipe.steps, 0.02))
    mixed = native_precision("cpu") == MIXED
    began, course = time.monotonic(), []
    for step in tqdm(range(recipe.steps), desc=f"{name}, seed {seed}", disable=not sys.stderr.isatty()):
        level = level_of(recipe, step, random)
        rows = max(1, recipe.tokens // task.length(level))
        inputs, targets = task.batch(random, rows, level)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = asked.loss(inputs, targets, start(model, rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, recipe.steps // 20) == 0:
            course.append({"step": step + 1, "level": level, "loss": float(loss.detach())})
    seconds = time.monotonic() - began
    found = {str(level): test(asked, task, level, recipe, seed, longest) for level in recipe.tests}
    return {
        "accuracy": found,
        "course": course,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": layer_parameters(model),
        "seconds": seconds,
    }


@torch.inference_mode()
def test(asked: Asked, task: Task, level: int, recipe: Recipe, seed: int, longest: int) -> float | None:
    """Return the share of what the task asks that the model has right, or None where it does not read so far.

    A GPT has no positions beyond ``longest``. The other peers come without a state to carry on from one part of a row
    to the next, and read no more than :data:`CHUNK` tokens.
    """
    model, length = asked.model.eval(), task.length(level)
    carries = isinstance(model, RecurrentLM | LSTM)
    if not carries and length > (longest if isinstance(model, GPT) else CHUNK):
        return None
    random = np.random.default_rng(TEST_SEED + seed)
    at_once = max(1, min(recipe.test_rows, 2 * recipe.tokens // min(length, CHUNK)))
    total = max(recipe.test_rows // 4, min(recipe.test_rows, TEST_TOKENS // length))
    scores = []
    for first in range(0, total, at_once):
        rows = min(at_once, total - first)
        inputs, targets = task.batch(random, rows, level)
        state, right = start(model, rows), []
        for begin in range(0, length, CHUNK):
            part = slice(begin, begin + CHUNK)
            logits, answers, state = asked(inputs[:, part], targets[:, part], state)
            right.append((logits.argmax(-1) == answers).view(rows, -1))
        scores.append((rows, task.score(torch.cat(right, dim=1))))
    return sum(rows * score for rows, score in scores) / total
