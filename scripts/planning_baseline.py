"""Train nanoGPT's CPU preset and two larger shapes of it for as long as a plan, and add a row for each.

Time is that of the processor. Each is given whatever helps it: the rate of updates is measured before, so that the
learning rate has fallen when the time is up; the precision that is faster here; 10 validations on a part of the text
that do not count as time, of which the best decides; the score of that one on windows that overlap by half, so that
no token but the first ones has less than half a window before it. The plan's own time has its start and its
validations in it.

    python scripts/planning_baseline.py data/plays data/manual --seconds 60

Rows that the table holds already are not trained again; without folders it only reports. The plans are rows of
docs/planning_search.csv.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from planning_study import append, digest, is_there, rows, table_parser, text_digest
from torch import Tensor

from mmrec.baselines.learning import RandomWindows, train_step
from mmrec.baselines.models import GPT
from mmrec.baselines.training import HYPERPARAMETERS, Hyperparameters, TrainingLoop
from mmrec.core.runtime import FULL, configure, native_precision
from mmrec.core.threads import use_threads
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.inference.metrics import token_nll
from mmrec.planning.comparison import bits_per_byte
from mmrec.training.callbacks.run_log import commit, environment

COLUMNS = (
    "text",
    "text_sha256",
    "sha256",
    "seconds",
    "model",
    "parameters",
    "tokens",
    "epochs",
    "seed",
    "bits_per_byte",
    "taken",
    "precision",
    "commit",
    "processor",
)
VALIDATIONS, VALIDATED = 10, 16_384
"""How many there are, and the first tokens of the validation text that each scores."""
TRIED = 30
"""Updates whose median time is taken."""
SCORED_ROWS = 64
"""Windows that are scored at once."""


@dataclass(frozen=True)
class Size:
    """A GPT: layers, heads and width, and what it is trained with."""

    layers: int
    heads: int
    dim: int
    hyperparameters: Hyperparameters


PRESET = HYPERPARAMETERS["gpt"]
SIZES = {
    "nanoGPT, CPU preset": Size(4, 4, 128, PRESET),
    "6 layers of 192": Size(6, 6, 192, Hyperparameters(12, 128, 1e-3, 0.1, 100, 0.1)),
    "6 layers of 256": Size(6, 8, 256, Hyperparameters(8, 256, 1e-3, 0.1, 100, 0.1)),
}
"""The two larger ones go towards nanoGPT's preset for a GPU (6 layers of 384, windows of 256)."""


def main() -> None:
    parser = table_parser(__doc__, "docs/planning_baseline.csv", "*")
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for each training")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--plans", type=Path, default=Path("docs/planning_search.csv"))
    options = parser.parse_args()
    configure()  # each computes as ours does
    for folder in options.data_dirs:
        for seed in options.seeds:
            for name in options.models:
                add_row(options.table, folder, name, options.seconds, seed)
    report(options.table, options.plans)


def add_row(table: Path, folder: Path, name: str, seconds: float, seed: int) -> None:
    """Train the model ``name``, and append what came of it to ``table``."""
    opened = open_tokens(folder)
    key = {"sha256": digest(opened), "seconds": f"{seconds:g}", "model": name, "seed": str(seed)}
    if is_there(table, key):
        return
    size = SIZES[name]
    use_threads(size.dim, size.hyperparameters.batch_size * size.hyperparameters.seq_len)
    paces = {precision: pace(size, opened, precision) for precision in {FULL, native_precision("cpu")}}
    precision = min(paces, key=lambda each: paces[each])
    steps = int(seconds / paces[precision])
    torch.manual_seed(seed)
    model = make_model(size, opened)
    taken, best = train(model, size, opened, steps, seed, precision)
    tokens = steps * size.hyperparameters.batch_size * size.hyperparameters.seq_len
    append(
        table,
        COLUMNS,
        key
        | {
            "text": folder.name,
            "text_sha256": text_digest(opened),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens": tokens,
            "epochs": round(tokens / len(opened.train), 3),
            "bits_per_byte": round(best, 4),
            "taken": round(taken, 1),
            "precision": precision,
            "commit": commit(),
            "processor": environment()["processor"],
        },
    )


def make_model(size: Size, folder: TokenFolder) -> GPT:
    """Return the model of that size for the vocabulary of ``folder``."""
    return GPT(folder.tokenizer.vocab_size, size.hyperparameters.seq_len, size.dim, size.layers, size.heads)


def pace(size: Size, folder: TokenFolder, precision: str) -> float:
    """Return the seconds of the processor that an update takes."""
    model = make_model(size, folder)
    loop = TrainingLoop(model, size.hyperparameters, None, precision)
    batches = RandomWindows(model, folder.train, size.hyperparameters, 0)
    taken = sorted(timed(lambda: train_step(loop, batches)) for _ in range(TRIED))
    return taken[TRIED // 2]


def timed(work: Callable[[], None]) -> float:
    """Return the seconds of the processor that ``work`` takes."""
    before = time.process_time()
    work()
    return time.process_time() - before


def train(model: GPT, size: Size, folder: TokenFolder, steps: int, seed: int, precision: str) -> tuple[float, float]:
    """Return the seconds of all updates, and the bits per byte on the whole validation text at the best one."""
    loop = TrainingLoop(model, size.hyperparameters, steps, precision)
    batches = RandomWindows(model, folder.train, size.hyperparameters, seed)
    window = size.hyperparameters.seq_len
    taken, best, weights = 0.0, float("inf"), model.state_dict()
    for step in range(1, steps + 1):
        taken += timed(lambda: train_step(loop, batches))
        if step * VALIDATIONS // steps > (step - 1) * VALIDATIONS // steps:
            reached = float(windowed_nll(model, folder.val[:VALIDATED], window).mean())
            if reached < best:
                best, weights = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return taken, bits_per_byte(windowed_nll(model, folder.val, window), folder)


@torch.inference_mode()
def windowed_nll(model: GPT, text: np.ndarray, window: int) -> Tensor:
    """Return the negative log-likelihood of each token of ``text``, [T], in nats, on windows that overlap by half."""
    tokens = torch.from_numpy(text.astype("int64"))
    nll = torch.zeros(len(tokens))
    begins = [*range(0, max(1, len(tokens) - 1 - window), window // 2), max(0, len(tokens) - 1 - window)]
    for first in range(0, len(begins), SCORED_ROWS):
        rows_of = torch.tensor(begins[first : first + SCORED_ROWS])
        places = rows_of[:, None] + torch.arange(min(window, len(tokens) - 1))
        logits, _ = model(tokens[places])
        # A later window sees more of what is before a token, but for its own first half.
        half = places.shape[1] // 2
        losses = token_nll(logits, tokens[places + 1], "none").view(places.shape)
        nll[places[:, half:] + 1] = losses[:, half:]
        if first == 0:
            nll[1 : half + 1] = losses[0, :half]
    return nll


def report(table: Path, plans: Path) -> None:
    """Print each text's plan beside the best of the three: the plan of their commit, or the newest where none is."""
    cells: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows(table):
        cells.setdefault((row["text_sha256"], row["seconds"]), []).append(row)
    for (text, seconds), found in cells.items():
        best = min(found, key=lambda row: float(row["bits_per_byte"]))
        planned = [
            row
            for row in rows(plans)
            if (row["text_sha256"], row["seconds"], row["change"]) == (text, seconds, "plan")
        ]
        planned.sort(key=lambda row: row["commit"] == best["commit"])
        told = f"{best['text']:<16} {seconds:>5} s  {best['model']} {best['bits_per_byte']}"
        if planned:
            ours = float(planned[-1]["bits_per_byte"])
            told += f", plan {ours:.3f}, {ours / float(best['bits_per_byte']) - 1:+.1%}"
        print(told)


if __name__ == "__main__":
    main()
