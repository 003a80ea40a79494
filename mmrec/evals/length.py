"""``mmrec eval length``: loss of the same text after more and more was read before it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmrec.baselines.models import GPT
from mmrec.checkpoints.loading import load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.core.threads import use_threads
from mmrec.data.store import TokenFolder, open_tokens_for
from mmrec.evals.peer import gpt_hyperparameters, learned_nll, train_gpt
from mmrec.evals.report import print_table, refuse_to_replace_results, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.reading import READ_CHUNK, iter_nll
from mmrec.model import RecurrentLM

BLOCK, BLOCKS = 256, 4
"""Tokens that are scored together, and how many such stand side by side in one span."""
CHUNK = 1024
"""Tokens of each row that are read at a time."""
Curve = tuple[list[int], np.ndarray]
"""Positions, and the losses there in each span [positions, spans]."""
APART = 4096
"""Up to this position each block of a span is read to by itself; further on the span as a whole, to save time."""


@torch.inference_mode()
def span_nll(net: nn.Module, text: np.ndarray, starts: np.ndarray, before: int, length: int, state: Any) -> Tensor:
    """Return the NLL of ``length`` tokens from each of ``starts``, [B, length] in nats, with ``before`` read first.

    Args:
        net: ours or a GPT.
        text: [tokens]; what stands before its start is its end.
        starts: [B], places in the text.
        before: how many tokens are read before them, at least 1.
        length: how many are scored.
        state: what ``net`` starts from.
    """
    scored: list[Tensor] = []
    device = next(net.parameters()).device
    for first in range(-before, length - 1, CHUNK):
        offsets = np.arange(first, min(first + CHUNK, length - 1) + 1)
        rows = torch.from_numpy(text[(starts[:, None] + offsets) % len(text)].astype(np.int64)).to(device)
        logits, state = net(rows[:, :-1], state)
        wanted = max(0, -1 - first)  # what is predicted here lies before what is scored
        if wanted < logits.shape[1]:
            scored.append(token_nll(logits[:, wanted:], rows[:, 1 + wanted :]).view(len(rows), -1))
    return torch.cat(scored, dim=1).cpu()


def by_position(net: nn.Module, text: np.ndarray, positions: Sequence[int], spans: int) -> np.ndarray:
    """Return the mean loss of the same blocks of text after every number of tokens, [positions, spans], in nats.

    A fair comparison needs the same targets: the text differs from place to place by more than what is looked for. So
    a position is not a place in the text, but how much of what stands before the block was read.

    Args:
        net: ours or a GPT, in evaluation mode.
        text: [tokens], longer than the last position.
        positions: tokens read before each block; beyond :data:`APART` up to 768 more.
        spans: places in the text, evenly apart, of 4 blocks of 256 tokens each.
    """
    begins = np.arange(spans) * (len(text) // spans)
    blocks = (begins[:, None] + np.arange(BLOCKS) * BLOCK).flatten()
    found = []
    for position in tqdm(positions, desc="positions", disable=not sys.stderr.isatty()):
        starts, length = (blocks, BLOCK) if position <= APART else (begins, BLOCK * BLOCKS)
        state = net.zero_state(len(starts)) if isinstance(net, RecurrentLM) else None
        found.append(span_nll(net, text, starts, position, length, state).double().view(spans, -1).mean(1).numpy())
    return np.stack(found)


def learned_by_position(net: RecurrentLM | GPT, text: np.ndarray, positions: Sequence[int], spans: int) -> np.ndarray:
    """Return the mean loss of the same spans with weights that learn, [positions, spans], in nats.

    They learn from every number of tokens before a span, and from the span itself, each part after it is scored.

    Args:
        net: ours or a GPT, in evaluation mode; the GPT learns from whole windows.
        text: [tokens], longer than the last position; what stands before its start is its end.
        positions: tokens read before each span.
        spans: places in the text, as in :func:`by_position`.
    """
    begins = np.arange(spans) * (len(text) // spans)
    found = np.empty((len(positions), spans))
    for row, position in enumerate(tqdm(positions, desc="learning", disable=not sys.stderr.isatty())):
        for column, begin in enumerate(begins):
            tokens = text[(begin + np.arange(-position, BLOCK * BLOCKS)) % len(text)]
            found[row, column] = _learned(net, tokens)[-BLOCK * BLOCKS :].double().mean()
    return found


def _learned(net: RecurrentLM | GPT, tokens: np.ndarray) -> Tensor:
    """Return the NLL of each token in nats, that of the first left out or 0, with weights that learn."""
    if isinstance(net, GPT):
        return learned_nll(net, tokens, len(net.positions.weight))
    return torch.cat([nll for nll, _ in iter_nll(net, tokens, SavedState.empty(net).learning(net))])


@dataclass(frozen=True)
class LengthOptions:
    """Which text is scored, after how much.

    Args:
        data_dir: token folder that the model was trained on; its validation text is read, which has to be longer
            than the last position.
        positions: how many tokens are read before.
        spans: places in the text that are scored, 1,024 tokens at each.
        learn_to: score with weights that learn from what is read before, too, at positions up to this one; the
            GPT as well, where there is one.
        gpt_tokens: train a GPT of 0.8 M parameters on so many tokens of the training text, to compare with.
        gpt_window: its longest text, in tokens.
        seed: of the GPT.
        output_dir: folder for length.json and length.png.

    Raises:
        UserError: a number is too small.
    """

    data_dir: Path = Path("data/shakespeare_plays")
    positions: Sequence[int] = (1, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
    spans: int = 16
    learn_to: int = 0
    gpt_tokens: int = 0
    gpt_window: int = 512
    seed: int = 0
    output_dir: Path = Path("eval")

    def __post_init__(self) -> None:
        if not self.positions or min(self.positions) < 1:
            raise UserError("--positions are numbers of at least 1: nothing predicts the first token of a text")
        if self.spans < 2:
            raise UserError(f"--spans is {self.spans}; it must be at least 2")

    @property
    def places(self) -> list[int]:
        """The positions, each once, in order."""
        return sorted(set(self.positions))

    def check(self, data: TokenFolder) -> None:
        """Raise UserError where the text of ``data`` is too short."""
        least = max(self.places[-1] + BLOCK * BLOCKS, self.spans * BLOCK * BLOCKS)
        if len(data.val) < least:
            raise UserError(
                f"{self.data_dir}: the validation text has {len(data.val):,} tokens; {self.spans} spans and position "
                f"{self.places[-1]:,} need {least:,}: prepare a longer one (--val_split), or give lower --positions "
                f"or --spans"
            )
        if self.gpt_tokens and not BLOCK < self.gpt_window < len(data.train):
            raise UserError(
                f"--gpt_window is {self.gpt_window}; it must be above {BLOCK} and shorter than the training text"
            )


def length(checkpoint: CheckpointOptions, options: LengthOptions) -> None:
    """Score the same characters after more and more was read before them.

    Raises:
        UserError: there is no such checkpoint, or the text is too short or of other tokens.
    """
    refuse_to_replace_results(options.output_dir, "length", b'{\n "spans": ')
    trained = load_chosen(checkpoint)
    use_threads(trained.net.config.dim, READ_CHUNK)
    data = open_tokens_for(options.data_dir, trained.tokenizer)
    options.check(data)
    text, places, spans = np.asarray(data.val), options.places, options.spans
    curves: dict[str, Curve] = {"mmrec": (places, by_position(trained.net, text, places, spans))}
    near = [place for place in places if place <= options.learn_to]
    if near:
        curves["mmrec, learned"] = (near, learned_by_position(trained.net, text, near, spans))
    window = options.gpt_window if options.gpt_tokens else None
    if window is not None:
        within = [place for place in places if place + BLOCK <= window]
        device, chosen = trained.net.embedding.weight.device, gpt_hyperparameters(window, 4096, 1e-3)
        gpt = train_gpt(data, chosen, options.gpt_tokens, options.seed, device)
        curves[f"GPT, window {window}"] = (within, by_position(gpt, text, within, spans))
        if near:
            curves["GPT, learned"] = (near, learned_by_position(gpt, text, near, spans))
    show(curves)
    listed = {name: {"positions": at, "losses": values.tolist()} for name, (at, values) in curves.items()}
    results = {"spans": spans, "span": BLOCK * BLOCKS, "curves": listed}
    save(options.output_dir / "length.json", results)
    save_plot(options.output_dir / "length.png", lambda axes: _draw(axes, curves, window))


def _draw(axes: Any, curves: dict[str, Curve], window: int | None) -> None:
    for name, (at, values) in curves.items():
        axes.plot(at, values.mean(1), marker="o", label=name)
    if window is not None:
        axes.axvline(window, color="C1", linestyle=":", label="context of the GPT")
    axes.set(xscale="log", xlabel="tokens read before", ylabel="loss of the same text, nats/token")


def show(curves: dict[str, Curve]) -> None:
    """Print the losses by position, and how far ours is above that at the position next to 4,096."""
    (places, ours), *others = curves.values()
    spans = ours.shape[1]
    anchor = min(range(len(places)), key=lambda index: abs(math.log(places[index] / 4096)))
    rows = []
    for place, losses in zip(places, ours, strict=True):
        apart = losses - ours[anchor]
        error = apart.std(ddof=1) / spans**0.5
        theirs = [f"{values[at.index(place)].mean():.4f}" if place in at else "-" for at, values in others]
        rows.append([f"{place:,}", f"{losses.mean():.4f}", f"{apart.mean():+.4f}", f"{error:.4f}", *theirs])
    head = ["tokens read before", "mmrec", f"above {places[anchor]:,}", "standard error", *list(curves)[1:]]
    print_table(f"nats/token of the same {spans * BLOCK * BLOCKS:,} tokens", head, rows)
