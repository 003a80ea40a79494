"""Measurements, each in a process of its own: ``python -m mmrec.bench.measurements '{"measurement": "train", ...}'``.

A process prints one line of JSON. Times are of the monotonic clock in seconds, memory is the largest resident size
of the process in bytes, or on a GPU the most that torch has had there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from mmrec.baselines.learning import make_batches, train_step, validation_loss
from mmrec.baselines.models import GPT, Cache, make_baseline, size
from mmrec.baselines.training import HYPERPARAMETERS, Hyperparameters, TrainingLoop, carries_state, initial_state
from mmrec.core.forks import call_in_copies
from mmrec.core.runtime import FULL, configure
from mmrec.data.store import open_tokens
from mmrec.model import RecurrentLM
from mmrec.model.decode import Decoder
from mmrec.training import exchange
from mmrec.training.exchange import Exchange


@dataclass(frozen=True)
class LearningOptions:
    """What :func:`learning` measures.

    Args:
        baseline: name of the model.
        folder: of ``mmrec prepare``.
        tokens: how many to train on.
        seed: of weights and order.
        precision: of the matrix products in training, Lightning's name; scores are in full precision.
        time_to_target: whether to train as in :data:`TIME_TO_TARGET`.
        evaluations: how often to score.
        device: that it is trained on.
    """

    baseline: str
    folder: str
    tokens: int
    seed: int
    precision: str = FULL
    time_to_target: bool = False
    evaluations: int = 8
    device: str = "cpu"


def wait_for(device: str) -> None:
    """Wait until all that was started on ``device`` is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device: str = "cpu") -> int:
    """Return the most bytes that this process has had on ``device`` so far; 0 where the system does not say.

    On a CPU it is its largest resident size; on MPS, which keeps no maximum, what the driver holds now.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def train_speed(
    baseline: str,
    length: int,
    vocab_size: int,
    seconds: float,
    precision: str,
    step_tokens: int = 4096,
    device: str = "cpu",
    group: Exchange | None = None,
) -> dict[str, Any]:
    """Train on random tokens for some seconds: forward, backward, clipping and update.

    Args:
        baseline: name of the model.
        length: tokens of a row.
        vocab_size: N.
        seconds: time to measure; at least one update is made.
        precision: of the matrix products, Lightning's name.
        step_tokens: tokens of an update, where a row is shorter.
        device: that it is trained on.
        group: of the processes that train one model together, this one on ``step_tokens`` tokens.
    """
    model = make_baseline(baseline, vocab_size, length).to(device)
    constant_rate = Hyperparameters(learning_rate=1e-3, warmup_steps=0)
    loop = TrainingLoop(model, constant_rate, None, precision, as_fit=True)

    def update(rows: int, length: int) -> None:
        tokens = torch.randint(vocab_size, (rows, length + 1), device=device)
        loss, _ = loop.loss(tokens[:, :-1], tokens[:, 1:], initial_state(model, rows))
        loop.update(loss, None if group is None else group.mean_gradients)

    rows = max(1, step_tokens // length)
    update(rows, min(length, 256))  # libraries set themselves up
    times = repeat(lambda: update(rows, length), seconds, device, group)
    return {"tokens_per_second": rows * length * len(times) / sum(times), "updates": len(times), "size": size(model)}


def train_speed_together(processes: int, step_tokens: int = 4096, **options: Any) -> dict[str, Any]:
    """Train as :func:`train_speed` does, the tokens of an update shared out over processes on cores of this machine.

    Args:
        processes: their number.
        step_tokens: tokens of an update of all of them.
        options: of :func:`train_speed`.

    Returns:
        ``tokens_per_second`` of all together.
    """
    with tempfile.TemporaryDirectory() as folder:

        def train(rank: int) -> float:
            meet = f"file://{folder}/meet"
            distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
            group = exchange.begin(exchange.ROOM)
            found = train_speed(step_tokens=step_tokens // processes, group=group, **options)
            return float(found["tokens_per_second"])

        return {"tokens_per_second": sum(call_in_copies(train, processes))}


def repeat(
    action: Callable[[], None], seconds: float, device: str = "cpu", group: Exchange | None = None
) -> list[float]:
    """Do ``action`` on ``device`` until ``seconds`` are over, once at least; return the time of each.

    All processes of ``group`` do it as often.
    """
    times: list[float] = []
    more = True
    while more:
        wait_for(device)
        started = time.monotonic()
        action()
        wait_for(device)
        times.append(time.monotonic() - started)
        more = sum(times) < seconds
        if group is not None:
            more = bool(group.gather(torch.tensor([more])).all())
    return times


@torch.inference_mode()
def decode_speed(
    baseline: str, position: int, vocab_size: int, seconds: float, tokens: int = 64, device: str = "cpu"
) -> dict[str, Any]:
    """Generate text, a token at a time, after ``position`` tokens were read.

    The cache of attention is filled with random numbers instead of what it would have read: that takes time that
    grows with the square of the position, and what the numbers are makes no difference to the speed.
    """
    capacity = position + tokens
    model = make_baseline(baseline, vocab_size, capacity).to(device).eval()
    if isinstance(model, GPT):
        state: Any = model.zero_state(1, capacity)
        state.memory[..., :position, :].normal_()
        state = Cache(state.memory, position)
    else:
        state = initial_state(model, 1)
        for first in range(0, position, 4096):
            _, state = model(torch.randint(vocab_size, (1, min(4096, position - first)), device=device), state)
    decoder = Decoder(model, state) if isinstance(model, RecurrentLM) and device == "cpu" else None
    read = state

    def generate() -> None:
        nonlocal state
        state, token = read, torch.zeros(1, 1, dtype=torch.int64, device=device)
        for _ in range(tokens):
            if decoder is not None:
                token = decoder.step([int(token)]).argmax()
            else:
                logits, state = model(token, state)
                token = logits[:, -1:].argmax(-1)

    generate()
    times = repeat(generate, seconds, device)
    return {"tokens_per_second": tokens * len(times) / sum(times), "state_bytes": state_bytes(state)}


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state."""
    if isinstance(state, Cache):
        return state_bytes(state.memory)
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(state_bytes(part) for part in state) if isinstance(state, list | tuple) else 0


@torch.inference_mode()
def read_speed(baseline: str, total: int, vocab_size: int, block: int = 1024, device: str = "cpu") -> dict[str, Any]:
    """Read ``total`` tokens, at least 8; return the seconds a token, and the memory, of every eighth.

    ``block`` tokens are read at a time, or an eighth of all if that is fewer.
    """
    block = min(block, total // 8)
    model = make_baseline(baseline, vocab_size, block).to(device).eval()
    state = initial_state(model, 1)
    parts, memory = [], []
    model(torch.randint(vocab_size, (1, block), device=device), state)
    for _ in range(8):
        blocks = total // 8 // block
        times = []
        for _ in range(blocks):
            tokens = torch.randint(vocab_size, (1, block), device=device)
            wait_for(device)
            started = time.monotonic()
            _, state = model(tokens, state)
            wait_for(device)
            times.append(time.monotonic() - started)
        # The fastest: on a shared machine the slower ones measure what else runs there.
        parts.append(min(times) / block)
        memory.append(peak_memory(device))
    return {"seconds_per_token": parts, "peak_bytes": memory, "state_bytes": state_bytes(state)}


TIME_TO_TARGET: dict[str, dict[str, Any]] = {
    "mmrec": {
        "batch_size": 16,
        "seq_len": 64,
        "learning_rate": 4e-3,
        "warmup_steps": 20,
        "max_tokens": 245_760,
        "mtp_loss_weight": 0.0,
    },
    # The preset's 2,000 updates end at 1.90 here; with a fifth more it gets there.
    "gpt": {"max_tokens": 1_843_200},
}
"""What of :data:`HYPERPARAMETERS` is changed for a model to reach the target soonest."""


def hyperparameters_of(baseline: str, time_to_target: bool) -> Hyperparameters:
    """Return the hyper-parameters of the model ``baseline`` for measuring its learning."""
    found = HYPERPARAMETERS.get(baseline, HYPERPARAMETERS["lstm"])
    return replace(found, **TIME_TO_TARGET.get(baseline, {})) if time_to_target else found


def learning(options: LearningOptions) -> dict[str, Any]:
    """Train on a token folder, and score all of its validation text now and then.

    A model with a state carries it, in training and in validation; the others are trained and scored on windows.
    Scoring is not counted in the time.
    """
    torch.manual_seed(options.seed)
    data = open_tokens(Path(options.folder))
    chosen = hyperparameters_of(options.baseline, options.time_to_target)
    model = make_baseline(options.baseline, data.tokenizer.vocab_size, chosen.seq_len).to(options.device)
    steps = chosen.steps(options.tokens)
    loop = TrainingLoop(model, chosen, steps, options.precision, clip_by_group=True)
    carries = carries_state(model)
    # Of windows, none ends with the last token of the text: so it was when the stored figures were measured.
    batches = make_batches(model, data.train if carries else data.train[:-1], chosen, options.seed)
    seconds, curve = 0.0, []
    while loop.step < steps:
        wait_for(options.device)
        started = time.monotonic()
        train_step(loop, batches)
        wait_for(options.device)
        seconds += time.monotonic() - started
        if loop.step == steps or loop.step % max(1, steps // options.evaluations) == 0:
            loss = validation_loss(model, data, chosen.seq_len)
            tokens = loop.step * chosen.batch_size * chosen.seq_len
            curve.append({"tokens": tokens, "seconds": seconds, "loss": loss})
    protocol = "carried" if carries else f"windowed at {chosen.seq_len}"
    return {"curve": curve, "size": size(model), "protocol": protocol}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train_speed,
    "train_together": train_speed_together,
    "decode": decode_speed,
    "read": read_speed,
    "learn": lambda **options: learning(LearningOptions(**options)),
}


def main() -> None:
    """Make the measurement that the first argument asks for."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    configure()
    torch.manual_seed(0)
    device = request["device"]
    before = peak_memory(device)
    result = MEASUREMENTS[request.pop("measurement")](**request)
    print(json.dumps({**result, "working_bytes": peak_memory(device) - before}))


if __name__ == "__main__":
    main()
