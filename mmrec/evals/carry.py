"""``mmrec eval carry``: loss of real text with the state reset at every window, carried, and with what is learned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.baselines.models import GPT
from mmrec.baselines.training import device_of, initial_state
from mmrec.checkpoints.learned import PART, Form
from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState, memory_bytes
from mmrec.core.errors import UserError
from mmrec.core.files import refuse_to_replace_picture
from mmrec.core.threads import use_threads
from mmrec.data.batches import WindowedEvalLoader
from mmrec.data.store import open_tokens_for
from mmrec.evals.peer import gpt_hyperparameters, learned_nll, train_gpt
from mmrec.evals.report import print_table, refuse_to_replace_results, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.reading import READ_CHUNK, iter_nll
from mmrec.inference.text_input import iter_file_tokens
from mmrec.model import RecurrentLM

ROWS = 32
"""Windows that are read side by side."""
GPT_RECIPE = 1024, 3e-3
"""Tokens of an update, as many as ``quickstart`` has, and the rate: better than nanoGPT's 1e-3 by 0.13 nats/byte."""


KEPT: dict[str, Form | None] = {"carried": None, "learned, small": "small", "learned": "full"}
"""What a memory keeps of a text: the state alone, or what weights have learned, in one form or the other."""


@dataclass(frozen=True)
class Reading:
    """A text that was read.

    Attributes:
        nll: [tokens - 1], of each token but the first, in nats, float64.
        memory: bytes of the numbers that the memory's file has after it.
        seconds: of the processor's time.
    """

    nll: Tensor
    memory: int
    seconds: float


def carried(trained: LoadedModel, text: np.ndarray, form: Form | None = None) -> Reading:
    """Read ``text`` with all before each token read, and learned from where a ``form`` is given."""
    memory, began = SavedState.empty(trained.net), time.process_time()
    memory, parts = memory if form is None else memory.learning(trained.net, form), []
    for nats, after in iter_nll(trained.net, text, memory):
        parts.append(nats)
        memory = after
    return Reading(torch.cat(parts)[1:].double(), memory_bytes(memory), time.process_time() - began)


@torch.inference_mode()
def windowed(net: RecurrentLM | GPT, text: np.ndarray, window: int) -> Tensor:
    """Return the same with the state reset after every ``window`` tokens."""
    parts, device = [], device_of(net)
    for inputs, targets, *_ in WindowedEvalLoader(text, window, ROWS):
        logits, _ = net(inputs.to(device), initial_state(net, len(inputs)))
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
        window: tokens between two resets of the state, and of the GPT's longest text.
        gpt_tokens: train a GPT of 0.8 M parameters on so many tokens of the training text of data_dir, to compare
            with; it learns from what it reads, too.
        seed: of the GPT.
        output_dir: folder for carry.json, carry.png, learned.png and forms.png.

    Raises:
        UserError: there is no text, or the window is too small.
    """

    data_dir: Path | None = None
    files: Sequence[str] = ()
    window: int = 256
    gpt_tokens: int = 0
    seed: int = 0
    output_dir: Path = Path("eval")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"--window is {self.window}; it must be at least 1")
        if self.data_dir is None and not self.files:
            raise UserError("there is no text to score; give --data_dir, --files or both")
        if self.gpt_tokens and self.data_dir is None:
            raise UserError("--gpt_tokens is for a GPT that is trained on the text of --data_dir; give that, too")

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

    def gpt(self, trained: LoadedModel) -> GPT | None:
        """Return the GPT that is compared with, if any; UserError where the training text is too short for it."""
        if not self.gpt_tokens or self.data_dir is None:
            return None
        data = open_tokens_for(self.data_dir, trained.tokenizer)
        if len(data.train) <= self.window:
            raise UserError(f"{self.data_dir}: the training text has {len(data.train)} tokens, too few for a window")
        chosen = gpt_hyperparameters(self.window, *GPT_RECIPE)
        return train_gpt(data, chosen, self.gpt_tokens, self.seed, device_of(trained.net))


def carry(checkpoint: CheckpointOptions, options: CarryOptions) -> None:
    """Score texts with the state reset at every window, carried, and with weights that learn, by one checkpoint.

    Raises:
        UserError: a text is not longer than a window or has unknown characters.
    """
    refuse_to_replace_results(options.output_dir, "carry", b'{\n "window": ')
    for name in ("learned", "forms"):
        refuse_to_replace_picture(options.output_dir / f"{name}.png", "--output_dir")
    trained = load_chosen(checkpoint)
    use_threads(trained.net.config.dim, READ_CHUNK)
    texts = options.texts(trained)
    gpt = options.gpt(trained)
    results = {name: compare(trained, text, options.window, gpt) for name, text in texts.items()}
    show(results, options.window)
    save(options.output_dir / "carry.json", {"window": options.window, "texts": results})
    save_plot(options.output_dir / "carry.png", lambda axes: _draw(axes, results))
    save_plot(options.output_dir / "learned.png", lambda axes: _draw_by_text(axes, results))
    save_plot(options.output_dir / "forms.png", lambda axes: _draw_forms(axes, results))


def compare(trained: LoadedModel, text: np.ndarray, window: int, gpt: GPT | None = None) -> dict[str, Any]:
    """Return the mean loss of ``text``, windowed, carried and learned, and of a GPT, if any.

    The GPT learns from windows one after the other, which takes the passes over the text that ours takes, and from
    parts of as many tokens as ours that are read again with the rest of a window before them, which takes more. In
    all; by the position in a window ("points"); and by the position in the text ("positions"). Of what a memory keeps
    also what it takes ("costs"): bytes, and seconds of the processor's time.
    """
    readings = {name: carried(trained, text, form) for name, form in KEPT.items()}
    losses = {"windowed": windowed(trained.net, text, window)}
    losses |= {name: reading.nll for name, reading in readings.items()}
    if gpt is not None:
        losses |= {"GPT": windowed(gpt, text, window), "GPT, learned": learned_nll(gpt, text, window)}
        losses["GPT, parts"] = learned_nll(gpt, text, min(PART, window))
    position = torch.arange(len(text) - 1)

    def means(place: Tensor, begin: int, end: int) -> dict[str, float]:
        here = (place >= begin) & (place < end)
        return {name: float(nll[here].mean()) for name, nll in losses.items()}

    points, positions = (
        [{"begin": begin, "end": end, **means(place, begin, end)} for begin, end in parts]
        for place, parts in ((position % window, bands(window)), (position, text_bands(len(position))))
    )
    costs = {name: {"bytes": reading.memory, "seconds": reading.seconds} for name, reading in readings.items()}
    whole = {"tokens": len(position), **means(position, 0, len(text)), "costs": costs}
    return {**whole, "points": points, "positions": positions}


def show(results: dict[str, Any], window: int) -> None:
    """Print the losses of each text: by the position in a window, by the position in the text, and in all."""
    peers = next(iter(results.values()))
    peers = [name for name in PEERS if name in peers]
    for title, key in (("position in the window", "points"), ("position in the text", "positions")):
        rows = []
        for name, result in results.items():
            for point in result[key]:
                rows.append([name, f"{point['begin']:,} to {point['end'] - 1:,}", *_figures(point, peers)])
            rows.append([name, "all", *_figures(result, peers)])
        print_table(f"nats/token, windows of {window}", ["text", title, *LOSSES, *GAINS, *peers], rows)


LOSSES, GAINS = ("windowed", *KEPT), tuple(f"gain, {name}" for name in KEPT)
PEERS = ("GPT", "GPT, learned", "GPT, parts")


def _figures(point: dict[str, Any], peers: list[str]) -> list[str]:
    gains = [f"{point['windowed'] - point[name]:+.4f}" for name in LOSSES[1:]]
    losses = [f"{point[name]:.4f}" for name in (*LOSSES, *peers)]
    return [*losses[: len(LOSSES)], *gains, *losses[len(LOSSES) :]]


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
        for windows, kind, line in (
            ("windowed", "carried", ":"), ("windowed", "learned", "-"), ("GPT", "GPT, learned", "--")
        ):  # fmt: skip
            if kind not in result:
                continue
            gain = [point[windows] - point[kind] for point in result["positions"]]
            axes.plot(middle, gain, line, marker="o", color=f"C{number}", label=f"{Path(name).name}, {kind}")
    axes.set(xscale="log", xlabel="position in the text", ylabel="gain over windows, nats/token")
    axes.set_ylim(bottom=0)


def _draw_forms(axes: Any, results: dict[str, Any]) -> None:
    """Draw what a memory gains by its size, as a share of what all weights gain; below, what it takes."""
    for name, result in results.items():
        gains = [result["windowed"] - result[kind] for kind in KEPT]
        sizes = [result["costs"][kind]["bytes"] / 1000 for kind in KEPT]
        shares = [100 * gain / max(abs(gains[-1]), 1e-9) for gain in gains]
        axes.plot(sizes, shares, marker="o", label=f"{Path(name).name}: 100 % is {gains[-1]:.2f} nats/token")
    tokens = sum(result["tokens"] for result in results.values())
    labels = []
    for kind, size in zip(KEPT, sizes, strict=True):
        took = sum(result["costs"][kind]["seconds"] for result in results.values())
        labels.append(f"{kind}\n{size:,.0f} kB\n{1e6 * took / tokens:,.0f} us/token")
    axes.set(xscale="log", xlabel="size of the memory, and the processor's time", ylabel="gain over windows, %")
    axes.set_xticks(sizes, labels)
    axes.set_xticks([], minor=True)
    axes.axhline(0, color="gray", label="windows")
