"""``mmrec eval carry``: loss of real text with the state reset at every window, carried, and with what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.core.threads import use_threads
from mmrec.data.batches import WindowedEvalLoader
from mmrec.data.store import open_tokens_for
from mmrec.evals.report import print_table, refuse_to_replace_results, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.reading import READ_CHUNK, iter_nll
from mmrec.inference.text_input import iter_file_tokens

ROWS = 32
"""Windows that are read side by side."""


def carried(trained: LoadedModel, text: np.ndarray, learn: bool = False) -> Tensor:
    """Return the NLL of each token but the first, [tokens - 1] in nats, with all before it read, or learned, too."""
    memory = SavedState.empty(trained.net)
    parts = [nats for nats, _ in iter_nll(trained.net, text, memory.learning(trained.net) if learn else memory)]
    return torch.cat(parts)[1:].double()


@torch.inference_mode()
def windowed(trained: LoadedModel, text: np.ndarray, window: int) -> Tensor:
    """Return the same with the state reset after every ``window`` tokens."""
    parts, device = [], trained.net.embedding.weight.device
    for inputs, targets, *_ in WindowedEvalLoader(text, window, ROWS):
        logits, _ = trained.net(inputs.to(device), trained.net.zero_state(len(inputs)))
        parts.append(token_nll(logits, targets.to(device)).cpu())
    return torch.cat(parts).double()


def bands(window: int) -> list[tuple[int, int]]:
    """Return the halves, quarters, ... of a window from its end to its first 16 tokens, as (begin, end)."""
    found, end = [], window
    while end > 16:
        found.append((end // 2, end))
        end //= 2
    return [(0, end), *found[::-1]]


def text_bands(tokens: int) -> list[tuple[int, int]]:
    """Return the first 1,024 tokens of a text, those to 2,047, to 4,095 and so on, as (begin, end)."""
    found = [(0, min(1024, tokens))]
    while found[-1][1] < tokens:
        found.append((found[-1][1], min(2 * found[-1][1], tokens)))
    return found


@dataclass(frozen=True)
class CarryOptions:
    """Which texts are scored, in which windows.

    Args:
        data_dir: score the validation text of this token folder.
        files: UTF-8 texts to score, too.
        window: tokens between two resets of the state.
        output_dir: folder for carry.json, carry.png and learned.png.

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
    """Score texts with the state reset at every window, carried, and with weights that learn, by one checkpoint.

    Raises:
        UserError: a text is not longer than a window or has unknown characters.
    """
    refuse_to_replace_results(options.output_dir, "carry", b'{\n "window": ')
    trained = load_chosen(checkpoint)
    use_threads(trained.net.config.dim, READ_CHUNK)
    texts = options.texts(trained)
    results = {name: compare(trained, text, options.window) for name, text in texts.items()}
    show(results, options.window)
    save(options.output_dir / "carry.json", {"window": options.window, "texts": results})
    save_plot(options.output_dir / "carry.png", lambda axes: _draw(axes, results))
    save_plot(options.output_dir / "learned.png", lambda axes: _draw_by_text(axes, results))


def compare(trained: LoadedModel, text: np.ndarray, window: int) -> dict[str, Any]:
    """Return the mean loss of ``text``, windowed, carried and learned.

    In all; by the position in a window ("points"); and by the position in the text ("positions").
    """
    losses = {
        "windowed": windowed(trained, text, window),
        "carried": carried(trained, text),
        "learned": carried(trained, text, learn=True),
    }
    position = torch.arange(len(text) - 1)

    def means(place: Tensor, begin: int, end: int) -> dict[str, float]:
        here = (place >= begin) & (place < end)
        return {name: float(nll[here].mean()) for name, nll in losses.items()}

    points, positions = (
        [{"begin": begin, "end": end, **means(place, begin, end)} for begin, end in parts]
        for place, parts in ((position % window, bands(window)), (position, text_bands(len(position))))
    )
    return {"tokens": len(position), **means(position, 0, len(text)), "points": points, "positions": positions}


def show(results: dict[str, Any], window: int) -> None:
    """Print the losses of each text: by the position in a window, by the position in the text, and in all."""
    for title, key in (("position in the window", "points"), ("position in the text", "positions")):
        rows = []
        for name, result in results.items():
            for point in result[key]:
                rows.append([name, f"{point['begin']:,} to {point['end'] - 1:,}", *_figures(point)])
            rows.append([name, "all", *_figures(result)])
        print_table(f"nats/token, windows of {window}", ["text", title, *LOSSES, *GAINS], rows)


LOSSES, GAINS = ("windowed", "carried", "learned"), ("gain, carried", "gain, learned")


def _figures(point: dict[str, Any]) -> list[str]:
    gains = [f"{point['windowed'] - point[name]:+.4f}" for name in LOSSES[1:]]
    return [*(f"{point[name]:.4f}" for name in LOSSES), *gains]


def _draw(axes: Any, results: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(results.items()):
        middle = [(point["begin"] + point["end"]) / 2 for point in result["points"]]
        gain = [point["windowed"] - point["carried"] for point in result["points"]]
        axes.plot(middle, gain, marker="o", color=f"C{number}", label=Path(name).name)
    axes.set(xscale="log", xlabel="position in the window", ylabel="gain of the carried state, nats/token")
    axes.set_ylim(bottom=0)


def _draw_by_text(axes: Any, results: dict[str, Any]) -> None:
    for number, (name, result) in enumerate(results.items()):
        middle = [(point["begin"] + point["end"]) / 2 for point in result["positions"]]
        for kind, line in (("carried", ":"), ("learned", "-")):
            gain = [point["windowed"] - point[kind] for point in result["positions"]]
            axes.plot(middle, gain, line, marker="o", color=f"C{number}", label=f"{Path(name).name}, {kind}")
    axes.set(xscale="log", xlabel="position in the text", ylabel="gain over windows, nats/token")
    axes.set_ylim(bottom=0)
