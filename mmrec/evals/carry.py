"""``mmrec eval carry``: what carrying the memory on gives on real text, against starting anew at every window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.checkpoint import LoadedModel, load_model
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.data.batches import WindowedEvalLoader
from mmrec.data.store import open_tokens_for
from mmrec.evals.report import print_table, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.scoring import iter_nll, tokens_of

ROWS = 32
"""Windows that are read side by side."""


def carried(trained: LoadedModel, text: np.ndarray) -> Tensor:
    """Return what each token but the first cost, [tokens - 1] in nats, with all before it read."""
    parts = [nats for nats, _ in iter_nll(trained.net, text, SavedState.empty(trained.net))]
    return torch.cat(parts)[1:].double()


@torch.inference_mode()
def windowed(trained: LoadedModel, text: np.ndarray, window: int) -> Tensor:
    """Return the same with a memory that is emptied after every ``window`` tokens."""
    parts = []
    for inputs, targets, *_ in WindowedEvalLoader(text, window, ROWS):
        logits, _ = trained.net(inputs, trained.net.zero_state(len(inputs)))
        parts.append(token_nll(logits, targets))
    return torch.cat(parts).double()


def bands(window: int) -> list[tuple[int, int]]:
    """Return the halves, quarters, ... of a window from its end to its first 16 tokens, as (begin, end)."""
    found, end = [], window
    while end > 16:
        found.append((end // 2, end))
        end //= 2
    return [(0, end), *found[::-1]]


def carry(
    checkpoint: CheckpointOptions,
    data_dir: Path | None = None,
    files: Sequence[str] = (),
    window: int = 256,
    output_dir: Path = Path("eval"),
) -> None:
    """Score texts with the memory carried on and with one that is emptied at every window, by the same checkpoint.

    Args:
        checkpoint: of the model.
        data_dir: score the validation text of this token folder.
        files: UTF-8 texts to score, too.
        window: tokens between two empty memories.
        output_dir: folder for carry.json and carry.png.

    Raises:
        UserError: there is nothing to score, or a text is shorter than a window or has unknown characters.
    """
    if window < 1:
        raise UserError(f"--window is {window}; it must be at least 1")
    if data_dir is None and not files:
        raise UserError("there is no text to score; give --data_dir, --files or both")
    trained = load_model(checkpoint.path())
    texts: dict[str, np.ndarray] = {}
    if data_dir is not None:
        texts[str(data_dir)] = np.asarray(open_tokens_for(data_dir, trained.tokenizer).val)
    for file in files:
        texts[file] = np.concatenate(list(tokens_of(trained, file)))
    results: dict[str, Any] = {}
    rows = []
    for name, text in texts.items():
        if len(text) <= window:
            raise UserError(f"{name}: has {len(text)} tokens, not more than a window of {window}")
        kept, emptied = carried(trained, text), windowed(trained, text, window)
        place = torch.arange(len(kept)) % window
        points = []
        for begin, end in bands(window):
            here = (place >= begin) & (place < end)
            point = {"windowed": float(emptied[here].mean()), "carried": float(kept[here].mean())}
            points.append({"begin": begin, "end": end, **point})
            rows.append([name, f"{begin} to {end - 1}", *_figures(**point)])
        whole = {"windowed": float(emptied.mean()), "carried": float(kept.mean())}
        rows.append([name, "all", *_figures(**whole)])
        results[name] = {"tokens": len(kept), **whole, "points": points}
    head = ["text", "place in the window", "windowed", "carried", "gain"]
    print_table(f"nats/token, windows of {window}", head, rows)
    save(output_dir / "carry.json", {"window": window, "texts": results})

    def draw(axes: Any) -> None:
        for number, (name, result) in enumerate(results.items()):
            middle = [(point["begin"] + point["end"]) / 2 for point in result["points"]]
            gain = [point["windowed"] - point["carried"] for point in result["points"]]
            axes.plot(middle, gain, marker="o", color=f"C{number}", label=Path(name).name)
        axes.set(xscale="log", xlabel="place in the window", ylabel="what the carried memory saves, nats/token")
        axes.set_ylim(bottom=0)

    save_plot(output_dir / "carry.png", draw)


def _figures(windowed: float, carried: float) -> list[str]:
    return [f"{windowed:.4f}", f"{carried:.4f}", f"{windowed - carried:+.4f}"]
