"""What is measured, each in a process of its own: ``python -m mmrec.bench.tasks '{"task": "train", ...}'``.

A process prints one line of JSON. Times are of the monotonic clock in seconds, memory is the largest resident size
of the process in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmrec.baselines.models import GPT, LSTM, Cache, make_baseline, size
from mmrec.baselines.training import RECIPES, detached, loss_of, loss_with_second, optimizer_of, reset_rows, start
from mmrec.core.allocation import keep_freed_pages
from mmrec.data.batches import SegmentSampler, StatefulEvalLoader, WindowedEvalLoader
from mmrec.data.store import open_tokens
from mmrec.model import RecurrentLM
from mmrec.model.decode import Decoder
from mmrec.training.mtp import MTPHead, mtp_weight
from mmrec.training.optim import warmup_cosine


def peak_memory() -> int:
    """Return the largest resident size of this process so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def train_speed(
    peer: str, length: int, vocab_size: int, seconds: float, precision: str, step_tokens: int = 4096
) -> dict[str, Any]:
    """Train on random tokens for some seconds: forward, backward, clipping and update.

    Args:
        peer: name of the model.
        length: tokens of a row.
        vocab_size: N.
        seconds: time to measure; at least one update is made.
        precision: of the matrix products, Lightning's name.
        step_tokens: tokens of an update, where a row is shorter.
    """
    model = make_baseline(peer, vocab_size, length)
    optimizer = optimizer_of(model, 1e-3, 0.1)

    def update(rows: int, length: int) -> None:
        tokens = torch.randint(vocab_size, (rows, length + 1))
        loss, _ = loss_of(model, tokens[:, :-1], tokens[:, 1:], start(model, rows), precision)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    rows = max(1, step_tokens // length)
    update(rows, min(length, 256))  # libraries set themselves up
    times = repeat(lambda: update(rows, length), seconds)
    return {"tokens_per_second": rows * length * len(times) / sum(times), "updates": len(times), "size": size(model)}


def repeat(action: Callable[[], None], seconds: float) -> list[float]:
    """Do ``action`` until ``seconds`` are over, once at least; return the time of each."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        began = time.monotonic()
        action()
        times.append(time.monotonic() - began)
    return times


@torch.inference_mode()
def decode_speed(peer: str, position: int, vocab_size: int, seconds: float, tokens: int = 64) -> dict[str, Any]:
    """Write text, a token at a time, after ``position`` tokens were read.

    The cache of attention is filled with random numbers instead of what it would have read: that takes time that
    grows with the square of the position, and what the numbers are makes no difference to the speed.
    """
    capacity = position + tokens
    model = make_baseline(peer, vocab_size, capacity).eval()
    if isinstance(model, GPT):
        state: Any = model.zero_state(1, capacity)
        state.memory[..., :position, :].normal_()
        state = Cache(state.memory, position)
    else:
        state = start(model, 1)
        for first in range(0, position, 4096):
            _, state = model(torch.randint(vocab_size, (1, min(4096, position - first))), state)
    decoder = Decoder(model, state) if isinstance(model, RecurrentLM) else None
    read = state

    def write() -> None:
        nonlocal state
        state, token = read, torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(tokens):
            if decoder is not None:
                token = decoder.step(int(token)).argmax()
            else:
                logits, state = model(token, state)
                token = logits[:, -1:].argmax(-1)

    write()
    times = repeat(write, seconds)
    return {"tokens_per_second": tokens * len(times) / sum(times), "state_bytes": state_bytes(state)}


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state."""
    if isinstance(state, Cache):
        return state_bytes(state.memory)
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(state_bytes(part) for part in state) if isinstance(state, list | tuple) else 0


@torch.inference_mode()
def reading(peer: str, total: int, vocab_size: int, block: int = 1024) -> dict[str, Any]:
    """Read ``total`` tokens, at least 8; return the seconds a token, and the memory, of every eighth.

    ``block`` tokens are read at a time, or an eighth of all if that is fewer.
    """
    block = min(block, total // 8)
    model = make_baseline(peer, vocab_size, block).eval()
    state = start(model, 1)
    parts, memory = [], []
    model(torch.randint(vocab_size, (1, block)), state)
    for _ in range(8):
        blocks = total // 8 // block
        times = []
        for _ in range(blocks):
            tokens = torch.randint(vocab_size, (1, block))
            began = time.monotonic()
            _, state = model(tokens, state)
            times.append(time.monotonic() - began)
        # The fastest: on a shared machine the others tell of the others.
        parts.append(min(times) / block)
        memory.append(peak_memory())
    return {"seconds_per_token": parts, "peak_bytes": memory, "state_bytes": state_bytes(state)}


INTERLEAVE = 8
"""Groups of rows that a model with a state reads in turn."""

RACES: dict[str, dict[str, float]] = {
    "mmrec": {
        "rows": 16,
        "length": 64,
        "learning_rate": 4e-3,
        "warmup": 20,
        "tokens": 245_760,
        "mtp_loss_weight": 0.0,
    },
    # The preset's 2,000 updates end at 1.90 here; with a fifth more it gets there.
    "gpt": {"tokens": 1_843_200},
}
"""How a model that need not go on learns a little soonest, where it is not as above with all tokens."""


def learning(
    peer: str, folder: str, tokens: int, seed: int, precision: str, race: bool = False, evaluations: int = 8
) -> dict[str, Any]:
    """Train on a token folder and score all of its validation text now and then, on the way that the model is used.

    A model with a state reads rows on with it, and is scored with it carried; attention is trained and scored on
    windows. Scoring is not counted in the time.

    Args:
        peer: name of the model.
        folder: of ``mmrec prepare``.
        tokens: how many to train on.
        seed: of weights and order.
        precision: of the matrix products in training, Lightning's name; scores are in full precision.
        race: learn as in :data:`RACES`.
        evaluations: how often to score.
    """
    torch.manual_seed(seed)
    data = open_tokens(Path(folder))
    recipe = RECIPES.get(peer, RECIPES["lstm"]) | (RACES.get(peer, {}) if race else {})
    tokens = int(recipe.get("tokens", tokens))
    rows, length = int(recipe["rows"]), int(recipe["length"])
    model = make_baseline(peer, data.tokenizer.vocab_size, length)
    carries = isinstance(model, RecurrentLM | LSTM)
    second_share = recipe.get("mtp_loss_weight", 0.0)
    second = MTPHead(model.config.dim) if isinstance(model, RecurrentLM) and second_share else None
    optimizer = optimizer_of(model, recipe["learning_rate"], recipe["weight_decay"], second)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = tokens // (rows * length)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, int(recipe["warmup"]), steps, recipe["final"]))
    stream = SegmentSampler(data.train, rows, length, seed, interleave=INTERLEAVE)
    memories: dict[int, Any] = {}
    random = np.random.default_rng(seed)

    def batch(number: int) -> tuple[Tensor, Tensor, Any, int]:
        if carries:
            inputs, targets, reset_mask, group = stream.batch(number)
            state = memories[group] if group in memories else start(model, rows)
            return inputs, targets, reset_rows(model, state, reset_mask), group
        at = random.integers(len(data.train) - length - 1, size=rows)[:, None] + np.arange(length + 1)
        window = torch.from_numpy(data.train[at].astype(np.int64))
        return window[:, :-1], window[:, 1:], start(model, rows), 0

    def score() -> float:
        model.eval()
        total, state = 0.0, start(model, 1)
        loader = StatefulEvalLoader(data.val, 2048) if carries else WindowedEvalLoader(data.val, length, 32)
        with torch.inference_mode():
            for inputs, targets, *_ in loader:
                loss, after = loss_of(model, inputs, targets, state if carries else start(model, len(inputs)))
                state = after if carries else state
                total += float(loss) * targets.numel()
        model.train()
        return total / (len(data.val) - 1)

    torch.set_flush_denormal(True)
    spent, course = 0.0, []
    for step in range(steps):
        began = time.monotonic()
        inputs, targets, state, group = batch(step)
        if isinstance(model, RecurrentLM) and second is not None:
            weight = mtp_weight(second_share, step, steps)
            loss, state = loss_with_second(model, second, weight, inputs, targets, state, precision)
        else:
            loss, state = loss_of(model, inputs, targets, state, precision)
        if carries:
            memories[group] = detached(state)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        spent += time.monotonic() - began
        if step + 1 == steps or (step + 1) % max(1, steps // evaluations) == 0:
            course.append({"tokens": (step + 1) * rows * length, "seconds": spent, "loss": score()})
    return {"course": course, "size": size(model), "protocol": "carried" if carries else f"windowed at {length}"}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train_speed,
    "decode": decode_speed,
    "read": reading,
    "learn": learning,
}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    keep_freed_pages()
    torch.manual_seed(0)
    before = peak_memory()
    result = TASKS[request.pop("task")](**request)
    print(json.dumps({**result, "working_bytes": peak_memory() - before}))


if __name__ == "__main__":
    main()
