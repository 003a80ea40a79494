"""Training on a synthetic task, by levels of rising difficulty, and accuracy at lengths trained on and beyond."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mmrec.baselines.models import GPT
from mmrec.baselines.training import Hyperparameters, TrainingLoop, carries_state, initial_state
from mmrec.core.runtime import MIXED, native_precision
from mmrec.evals.models import SelectiveLogits, layer_parameters, make_model
from mmrec.evals.tasks import Task
from mmrec.model import ModelConfig, RecurrentLM

CPU_DEVICE = torch.device("cpu")
CHUNK = 4096
"""Tokens of a row that are read at a time in a test; beyond that only models with a state go on."""
TEST_TOKENS = 1 << 21
"""Of a test: with more than that it has fewer rows, down to a quarter of them."""
TEST_SEED = 1 << 20
"""Added to a seed for the rows of tests, which no training then draws."""


@dataclass(frozen=True)
class Recipe:
    """Training and test of a task; the same for every model but for the learning rate.

    Args:
        task: makes the task.
        config: of our model; the baselines have as many layers and parameters.
        train_levels: a curriculum, each for its share of the first half of all updates; then all, mostly the last.
        test_levels: levels tested, those trained on and beyond.
        steps: updates.
        tokens: of an update, at least one row.
        learning_rate: of our model.
        baseline_learning_rate: of the baselines.
        test_rows: rows of a test.
    """

    task: Callable[[], Task]
    config: ModelConfig
    train_levels: Sequence[int]
    test_levels: Sequence[int]
    steps: int
    tokens: int = 8192
    learning_rate: float = 3e-3
    baseline_learning_rate: float = 2e-3
    test_rows: int = 256

    def hyperparameters(self, model: nn.Module) -> Hyperparameters:
        """Return the hyper-parameters of ``model``."""
        rate = self.learning_rate if isinstance(model, RecurrentLM) else self.baseline_learning_rate
        warmup = self.steps // 20
        return Hyperparameters(learning_rate=rate, weight_decay=0.0, warmup_steps=warmup, min_lr_ratio=0.02)


def sample_level(recipe: Recipe, step: int, random: np.random.Generator) -> int:
    """Return the level of update ``step``: half of the time the hardest reached so far, else any up to it."""
    levels = recipe.train_levels
    reached = min(len(levels) - 1, 2 * step * len(levels) // recipe.steps)
    return levels[reached if random.random() < 0.5 else int(random.integers(reached + 1))]


def train(name: str, recipe: Recipe, seed: int, device: torch.device = CPU_DEVICE) -> dict[str, Any]:
    """Train the model ``name`` on the recipe's task, on ``device``, and test it.

    Returns:
        ``accuracy`` by level (None where the model cannot read so far), ``curve`` of losses, ``parameters``,
        ``layer_parameters``, ``seconds``.
    """
    torch.manual_seed(seed)
    random, task = np.random.default_rng(seed), recipe.task()
    longest = max(task.length(level) for level in recipe.train_levels)
    model = make_model(name, recipe.config, task.vocab_size, longest).to(device)
    scorer = SelectiveLogits(model)
    loop = TrainingLoop(model, recipe.hyperparameters(model), recipe.steps)
    mixed = native_precision(device.type) == MIXED
    started, curve = time.monotonic(), []
    for _ in tqdm(range(recipe.steps), desc=f"{name}, seed {seed}", disable=not sys.stderr.isatty()):
        level = sample_level(recipe, loop.step, random)
        rows = max(1, recipe.tokens // task.length(level))
        inputs, targets = (part.to(device) for part in task.batch(random, rows, level))
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = scorer.loss(inputs, targets, initial_state(model, rows))
        loop.update(loss)
        if loop.step % max(1, recipe.steps // 20) == 0:
            curve.append({"step": loop.step, "level": level, "loss": float(loss.detach())})
    seconds = time.monotonic() - started
    return {
        "accuracy": {str(level): test(scorer, task, level, recipe, seed) for level in recipe.test_levels},
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": layer_parameters(model),
        "seconds": seconds,
    }


@torch.inference_mode()
def test(scorer: SelectiveLogits, task: Task, level: int, recipe: Recipe, seed: int) -> float | None:
    """Return the accuracy at ``level``, or None where the model does not read so far.

    A GPT has no positions beyond the longest row that it was trained on. Baselines without a state to carry from one
    part of a row to the next read no more than :data:`CHUNK` tokens.
    """
    model, length = scorer.model.eval(), task.length(level)
    longest = model.positions.num_embeddings if isinstance(model, GPT) else CHUNK
    if not carries_state(model) and length > longest:
        return None
    random, device = np.random.default_rng(TEST_SEED + seed), next(model.parameters()).device
    batch_size = max(1, min(recipe.test_rows, 2 * recipe.tokens // min(length, CHUNK)))
    total = max(recipe.test_rows // 4, min(recipe.test_rows, TEST_TOKENS // length))
    scores = []
    for first in range(0, total, batch_size):
        rows = min(batch_size, total - first)
        inputs, targets = (part.to(device) for part in task.batch(random, rows, level))
        state, correct = initial_state(model, rows), []
        for begin in range(0, length, CHUNK):
            part = slice(begin, begin + CHUNK)
            logits, answers, state = scorer(inputs[:, part], targets[:, part], state)
            correct.append((logits.argmax(-1) == answers).view(rows, -1))
        scores.append((rows, task.accuracy(torch.cat(correct, dim=1).cpu())))
    return sum(rows * score for rows, score in scores) / total
