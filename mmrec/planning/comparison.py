"""What a model makes of the validation text, beside PPMd and with a memory that learns and counts as it reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.cached import LARGEST_VOCABULARY
from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState
from mmrec.data.store import TokenFolder
from mmrec.inference.compressors import ppmd_sizes
from mmrec.inference.metrics import TextMetrics
from mmrec.inference.reading import Reader, with_text_counted
from mmrec.planning.text import MOST_COMPRESSED, spelled
from mmrec.tokenizers import token_lengths

MOST_SCORED = 2_000_000
"""Tokens of the validation text that are scored."""
SHARE, MOST_SECONDS = 0.05, 60.0
"""Of the time asked for, and seconds: what the comparison takes at most."""
COUNTED, COMPRESSED = 50_000, 1_000_000
"""Tokens whose n-grams are counted in a second, and bytes that PPMd takes: fewer than on a slow core."""
CACHE = 16
"""MiB of the cache of n-grams."""


def comparison_seconds(minutes: float) -> float:
    """Return the seconds for the comparison after a training that is given ``minutes``."""
    return min(MOST_SECONDS, SHARE * 60 * minutes)


@dataclass(frozen=True)
class Comparison:
    """Bits per byte of the first tokens of the validation text.

    Attributes:
        tokens: so many they are.
        state: with the state carried.
        memory: with weights that learn from what is read, and n-grams that are counted.
        counts: whether n-grams are counted: not of a large vocabulary.
        ppmd: by PPMd, after the training text; None where pyppmd is not installed.
    """

    tokens: int
    state: float
    memory: float
    counts: bool
    ppmd: float | None


def carried_nll(trained: LoadedModel, folder: TokenFolder) -> Tensor:
    """Return the negative log-likelihood of each of the first :data:`MOST_SCORED` validation tokens, [T], in nats."""
    reader = Reader(trained.net, SavedState.empty(trained.net))
    return torch.cat([part.nll.cpu() for part in reader.read(folder.val[:MOST_SCORED])])


def bits_per_byte(nll: Tensor, folder: TokenFolder) -> float:
    """Return the bits per byte of the first tokens of the validation text.

    Args:
        nll: [T], of each of them, in nats; the first of a text is not scored.
        folder: has the text.
    """
    lengths = torch.from_numpy(token_lengths(folder.tokenizer))
    tokens = torch.from_numpy(folder.val[: len(nll)].astype(np.int64))
    metrics = TextMetrics()
    metrics.update(nll[1:], lengths[tokens[1:]])
    return float(metrics.compute()["bits_per_byte"])


def compare(trained: LoadedModel, folder: TokenFolder, nll: Tensor, seconds: float) -> Comparison | None:
    """Return what is made of as much of the validation text as is read in the time; None where that is next to none.

    Args:
        trained: the model.
        folder: has the text.
        nll: as :func:`carried_nll` returns it.
        seconds: half of them are for reading; a quarter each bounds what is counted and compressed before.
    """
    memory = SavedState.empty(trained.net).learning(trained.net)
    counts = trained.tokenizer.vocab_size <= LARGEST_VOCABULARY
    if counts:
        counted = folder.train[-max(1, int(COUNTED * seconds / 4)) :]
        memory = with_text_counted(trained.net, memory, CACHE, [counted])
    found = torch.cat([*_read_for(Reader(trained.net, memory), folder, len(nll), seconds / 2)])
    if len(found) < 2:
        return None
    most = max(1, min(MOST_COMPRESSED, int(COMPRESSED * seconds / 4)))
    text = spelled(folder, folder.val[: len(found)])
    sizes = ppmd_sizes([spelled(folder, folder.train[-most:])[-most:], text])
    ppmd = None if sizes is None else 8 * (sizes[1] - sizes[0]) / len(text)
    return Comparison(
        len(found), bits_per_byte(nll[: len(found)], folder), bits_per_byte(found, folder), counts, ppmd
    )


def _read_for(reader: Reader, folder: TokenFolder, tokens: int, seconds: float) -> Iterator[Tensor]:
    """Yield the negative log-likelihoods of the parts of the validation text that are read in so many seconds."""
    end = time.monotonic() + seconds
    for part in reader.read(folder.val[:tokens]):
        yield part.nll.cpu()
        if time.monotonic() > end:
            return
