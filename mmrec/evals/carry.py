"""``mmrec eval carry``: loss of real text with the state carried, against the state reset at every window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.data.batches import WindowedEvalLoader
from mmrec.data.store import open_tokens_for
from mmrec.evals.report import print_table, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.reading import iter_nll
from mmrec.inference.text_input import iter_file_tokens

ROWS = 32
"""Windows that are read side by side."""


def carried(trained: LoadedModel, text: np.ndarray) -> Tensor:
    """Return the NLL of each token but the first, [tokens - 1] in nats, with all before it read."""
    parts = [nats for nats, _ in iter_nll(trained.net, text, SavedState.empty(trained.net))]
    return torch.cat(parts)[1:].double()


@torch.inference_mode()
def windowed(trained: LoadedModel, text: np.ndarray, window: int) -> Tensor:
    """Return the same with the state reset after every ``window`` tokens."""
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


@dataclass(frozen=True)
class CarryOptions:
    """Which texts are scored, in which windows.

    Args:
        data_dir: score the validation text of this token folder.
        files: UTF-8 texts to score, too.
        window: tokens between two resets of the state.
        output_dir: folder for carry.json and carry.png.

    Raises:
        UserError: there is no text, or the window is too small.
    """

    data_dir: Path | None = None
    files: Sequence[str] = ()
    window: int = 256
    output_dir: Path = Path("eval")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"--window is {self.window}; it must be at least 1")
        if self.data_dir is None and not self.files:
            raise UserError("there is no text to score; give --data_dir, --files or both")

    def texts(self, trained: LoadedModel) -> dict[str, np.ndarray]:
        """Return the tokens of each text by its name; UserError where one is not longer than a window."""
        found: dict[str, np.ndarray] = {}
        if self.data_dir is not None:
            found[str(self.data_dir)] = np.asarray(open_tokens_for(self.data_dir, trained.tokenizer).val)
        for file in self.files:
            found[file] = np.concatenate(list(iter_file_tokens(trained.tokenizer, file)))
        for name, text in found.items():
            if len(text) <= self.window:
                raise UserError(f"{name}: has {len(text)} tokens, not more than a window of {self.window}")
        return found


def carry(checkpoint: CheckpointOptions, options: CarryOptions) -> None:
    """Score texts with the state carried and with the state reset at every window, by the same checkpoint.

    Raises:
        UserError: a text is not longer than a window or has unknown characters.
    """
    trained = load_model(checkpoint.path())
    texts = options.texts(trained)
    results = {name: compare(trained, text, options.window) for name, text in texts.items()}
    show(results, options.window)
    save(options.output_dir / "carry.json", {"window": options.window, "texts": results})
    save_plot(options.output_dir / "carry.png", lambda axes: _draw(axes, results))


def compare(trained: LoadedModel, text: np.ndarray, window: int) -> dict[str, Any]:
    """Return the mean loss of ``text``, carried and windowed: in all, and by the position in a window."""
    kept, emptied = carried(trained, text), windowed(trained, text, window)
    position = torch.arange(len(kept)) % window
    points = []
    for begin, end in bands(window):
        here = (position >= begin) & (position < end)
        point = {"windowed": float(emptied[here].mean()), "carried": float(kept[here].mean())}
        points.append({"begin": begin, "end": end, **point})
    whole = {"windowed": float(emptied.mean()), "carried": float(kept.mean())}
    return {"tokens": len(kept), **whole, "points": points}


def show(results: dict[str, Any], window: int) -> None:
    """Print the losses of each text, by the position in a window and in all."""
    rows = []
    for name, result in results.items():
        for point in result["points"]:
            rows.append([name, f"{point['begin']} to {point['end'] - 1}", *_figures(point)])
        rows.append([name, "all", *_figures(result)])
    head = ["text", "position in the window", "windowed", "carried", "gain"]
    print_table(f"nats/token, windows of {window}", head, rows)


def _figures(point: dict[str, Any]) -> list[str]:
    windowed, carried = point["windowed"], point["carried"]
    return [f"{windowed:.4f}", f"{carried:.4f}", f"{windowed - carried:+.4f}"]


def _draw(axes: Any, results: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(results.items()):
        middle = [(point["begin"] + point["end"]) / 2 for point in result["points"]]
        gain = [point["windowed"] - point["carried"] for point in result["points"]]
        axes.plot(middle, gain, marker="o", color=f"C{number}", label=Path(name).name)
    axes.set(xscale="log", xlabel="position in the window", ylabel="gain of the carried state, nats/token")
    axes.set_ylim(bottom=0)
