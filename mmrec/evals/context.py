"""``mmrec eval context``: loss of the same characters of whole books, with more and more of the book read before."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.core.errors import UserError
from mmrec.core.threads import use_threads
from mmrec.evals.report import print_table, refuse_to_replace_results, save, save_plot
from mmrec.inference.metrics import token_nll
from mmrec.inference.text_input import iter_file_tokens
from mmrec.model import RecurrentLM
from mmrec.tokenizers import token_lengths

CHUNK, ROWS = 256, 16
"""Tokens of a row that are read at a time, and rows side by side."""
BLOCK = 256
"""Tokens whose mean is one sample of the standard errors."""
ANCHOR = 1024
"""Characters read before, from which gains are counted."""


@torch.inference_mode()
def context_nll(net: RecurrentLM, text: np.ndarray, first: int, count: int, before: int) -> np.ndarray:
    """Return the NLL of ``count`` tokens of ``text`` from ``first`` on, [count] in nats, float64.

    Rows of ``2 * before`` tokens are read from the zero state, each beginning ``before`` tokens after the last, and
    the second half of each is scored: every token once, with ``before`` to ``2 * before - 1`` tokens read before it.
    That takes two passes over the text however much is read before.

    Args:
        net: in evaluation mode.
        text: [tokens].
        first: at least ``before``.
        count: of scored tokens.
        before: at least 1.
    """
    found = np.empty((-(-count // before), before))
    starts = first - before + np.arange(len(found)) * before
    device = net.embedding.weight.device
    for begin in range(0, len(starts), ROWS):
        here = starts[begin : begin + ROWS]
        # The last row may go beyond what is scored, and even beyond the text: what it has there is left out below.
        places = np.minimum(here[:, None] + np.arange(2 * before), len(text) - 1)
        rows = torch.from_numpy(text[places].astype(np.int64)).to(device)
        state = net.zero_state(len(rows))
        for start in range(0, 2 * before - 1, CHUNK):
            end = min(start + CHUNK, 2 * before - 1)
            hidden, state = net.hidden(rows[:, start:end], state)
            scored = max(start, before - 1)
            if scored < end:
                nll = token_nll(net.logits(hidden)[:, scored - start :], rows[:, scored + 1 : end + 1])
                found[begin : begin + ROWS, scored + 1 - before : end + 1 - before] = nll.view(len(rows), -1).cpu()
    return found.flatten()[:count]


@dataclass(frozen=True)
class ContextOptions:
    """Which texts are scored, after how much of them.

    Args:
        files: UTF-8 texts to score, such as books that were not trained on.
        before: characters that are read before each scored one, to twice as many; in tokens of several characters
            about so many.
        scored: most characters of a text that are scored, from the largest of ``before`` on.
        output_dir: folder for context.json and context.png.

    Raises:
        UserError: there is no text, or a number is too small.
    """

    files: Sequence[str] = ()
    before: Sequence[int] = (256, 1024, 4096, 16384, 32768)
    scored: int = 65536
    output_dir: Path = Path("eval")

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("there is no text to score; give --files")
        if not self.before or min(self.before) < 1:
            raise UserError("--before are numbers of at least 1: nothing predicts the first character of a text")
        if self.scored < 1:
            raise UserError(f"--scored is {self.scored}; it must be at least 1")

    @property
    def distances(self) -> list[int]:
        """The numbers of ``before`` in their order, each once."""
        return sorted(set(self.before))

    def losses(self, trained: LoadedModel, file: str) -> dict[str, Any]:
        """Return what :func:`context` keeps of one text; UserError where it is too short."""
        text = np.concatenate([np.empty(0, np.int64), *iter_file_tokens(trained.tokenizer, file)])
        lengths = token_lengths(trained.tokenizer)[text, 1]
        before, scored = self.distances, self.scored * len(text) // max(1, int(lengths.sum()))
        tokens = [max(1, round(number * len(text) / max(1, lengths.sum()))) for number in before]
        first = tokens[-1]
        count = min(scored, len(text) - first)
        if count < 2 * BLOCK:
            raise UserError(
                f"{file}: {max(0, count):,} tokens would be scored, fewer than {2 * BLOCK}: with --before "
                f"{before[-1]:,} and --scored {self.scored:,} of its {len(text):,}; give a longer text, or others"
            )
        bar = tqdm(tokens, desc=Path(file).name, disable=not sys.stderr.isatty())
        nll = np.stack([context_nll(trained.net, text, first, count, number) for number in bar])
        characters = int(lengths[first : first + count].sum())
        return {"tokens": count, "characters": characters, "before": before} | _gains(nll, characters, anchor(before))


def anchor(before: Sequence[int]) -> int:
    """Return the place in ``before`` of what is next to :data:`ANCHOR` characters."""
    return min(range(len(before)), key=lambda place: abs(math.log(before[place] / ANCHOR)))


def _gains(nll: np.ndarray, characters: int, anchor: int) -> dict[str, list[float]]:
    """Return losses, what each is below that at ``anchor``, and its error, in nats/char, of NLL [before, T]."""
    share = nll.shape[1] / characters  # tokens a character
    apart = nll[anchor] - nll
    blocks = apart[:, : apart.shape[1] // BLOCK * BLOCK].reshape(len(nll), -1, BLOCK).mean(2)
    found = {
        "losses": nll.mean(1),
        "gains": apart.mean(1),
        "errors": blocks.std(1, ddof=1) / blocks.shape[1] ** 0.5,
    }
    return {name: (values * share).tolist() for name, values in found.items()}


def context(checkpoint: CheckpointOptions, options: ContextOptions) -> None:
    """Score the same characters of each text after more and more of it was read before.

    Raises:
        UserError: there is no such checkpoint, or a text is too short, or has unknown characters.
    """
    refuse_to_replace_results(options.output_dir, "context", b'{\n "before": ')
    trained = load_chosen(checkpoint)
    use_threads(trained.net.config.dim, CHUNK)
    texts = {file: options.losses(trained, file) for file in options.files}
    show(texts)
    save(options.output_dir / "context.json", {"before": options.distances, "texts": texts})
    save_plot(options.output_dir / "context.png", lambda axes: _draw(axes, texts))


def show(texts: dict[str, dict[str, Any]]) -> None:
    """Print the loss of each text by what was read before, what it is below the anchor, and the means of all."""
    rows = []
    before = next(iter(texts.values()))["before"]
    for file, found in texts.items():
        for number, loss, gain, error in zip(before, found["losses"], found["gains"], found["errors"], strict=True):
            rows.append([Path(file).name, _span(number), f"{loss:.4f}", f"{gain:+.4f}", f"{error:.4f}"])
    if len(texts) > 1:
        losses, gains = (np.array([found[name] for found in texts.values()]) for name in ("losses", "gains"))
        errors = gains.std(0, ddof=1) / len(texts) ** 0.5  # by the texts
        for number, loss, gain, error in zip(before, losses.mean(0), gains.mean(0), errors, strict=True):
            rows.append([f"all {len(texts)}", _span(number), f"{loss:.4f}", f"{gain:+.4f}", f"{error:.4f}"])
    head = ["text", "characters read before", "nats/char", f"below {_span(before[anchor(before)])}", "standard error"]
    characters = sum(found["characters"] for found in texts.values())
    print_table(f"nats/char of the same {characters:,} characters", head, rows)


def _span(number: int) -> str:
    return f"{number:,} to {2 * number:,}"


def _draw(axes: Any, texts: dict[str, dict[str, Any]]) -> None:
    for file, found in texts.items():
        axes.errorbar(found["before"], found["gains"], found["errors"], marker="o", label=Path(file).name)
    axes.set(xscale="log", xlabel="characters read before, to twice as many", ylabel="gain, nats/char")
