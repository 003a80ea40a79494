"""Reading texts of any length in constant memory: keeping what was read, and scoring each token."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmrec.checkpoints.checkpoint import LoadedModel, load_model
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState, load_memory, model_hash, save_memory
from mmrec.core.errors import UserError
from mmrec.core.text_files import is_unicode
from mmrec.inference.metrics import MetricsByPosition, TextMetrics, token_nll
from mmrec.model import RecurrentLM
from mmrec.tokenizers import PIECE, last_cut, token_lengths

CHUNK = 2048
"""Tokens that are read at a time."""


def pieces(file: IO[str], size: int = PIECE) -> Iterator[str]:
    """Yield a text piece by piece; joined tokens of the pieces are those of the whole.

    A piece ends before white space, where every tokenizer cuts anyway; where there is none for long, anywhere.
    """
    held = ""
    while block := file.read(size):
        begin = max(0, len(held) - 2)  # before it no cut was found; a line end may lie across it
        held += block
        cut = last_cut(held, begin, len(held))
        if cut > begin:
            yield held[:cut]
            held = held[cut:]
        elif len(held) > 64 * size:
            yield held
            held = ""
    if held:
        yield held


@torch.inference_mode()
def iter_logits(
    net: RecurrentLM, tokens: np.ndarray, memory: SavedState
) -> Iterator[tuple[Tensor, Tensor, SavedState]]:
    """Read tokens [T] on from ``memory``, a chunk at a time.

    Yields:
        What the model expected before each token of the chunk, logits [n, N] (of no meaning before the very first
        token of a text); those tokens [n], int64; and the memory after the chunk.
    """
    for first in range(0, len(tokens), CHUNK):
        part = torch.from_numpy(tokens[first : first + CHUNK].astype(np.int64))
        logits, state = net(part[None], memory.state)
        expected = torch.cat([memory.logits[None], logits[0, :-1]])
        memory = SavedState(state, logits[0, -1].clone(), memory.position + len(part))
        yield expected.float(), part, memory


@torch.inference_mode()
def iter_nll(net: RecurrentLM, tokens: np.ndarray, memory: SavedState) -> Iterator[tuple[Tensor, SavedState]]:
    """Read tokens [T] on from ``memory``, a chunk at a time.

    Yields:
        The negative log-likelihood of each token of the chunk [n], in nats, given all before it (0 for the very first
        token of a text, which nothing could predict); and the memory after the chunk.
    """
    for logits, part, after in iter_logits(net, tokens, memory):
        nll = token_nll(logits, part)
        if after.position == len(part):  # nothing was read before it
            nll[0] = 0
        yield nll, after


@contextmanager
def opened(path: str) -> Iterator[tuple[IO[str], int | None]]:
    """Open a text file, or standard input for "-"; yield it and its bytes, where they are known.

    A byte order mark is left out, as where texts are prepared.
    """
    if path == "-":
        yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=""), None
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file, Path(path).stat().st_size
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def tokens_of(trained: LoadedModel, path: str) -> Iterator[np.ndarray]:
    """Yield the tokens of a file piece by piece, with a progress bar; UserError where it is no UTF-8 text."""
    with (
        opened(path) as (file, size),
        tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()) as bar,
    ):
        text_before = False
        try:
            for piece in pieces(file):
                if not is_unicode(piece):
                    raise UserError(f"{path}: is not UTF-8")
                yield trained.tokenizer.encode(piece)
                text_before = True
                bar.update(len(piece.encode("utf-8")))
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
        if not text_before:
            raise UserError(f"{path}: is empty")


def _start(checkpoint: CheckpointOptions, memory: Path | None) -> tuple[LoadedModel, str, SavedState]:
    trained = load_model(checkpoint.path())
    model = model_hash(trained.net, trained.tokenizer)
    return (
        trained,
        model,
        SavedState.empty(trained.net) if memory is None else load_memory(memory, trained.net, model),
    )


def read(
    checkpoint: CheckpointOptions,
    file: str,
    save: Path,
    memory: Path | None = None,
) -> None:
    """Read a text of any length and keep what was read, to go on from by generate, score or another read.

    Args:
        checkpoint: of the model.
        file: a UTF-8 text, or - for standard input.
        save: the file to write.
        memory: go on from what was read before.
    """
    if not save.absolute().parent.is_dir():  # found out now, not after hours of reading
        raise UserError(f"{save}: cannot be written: there is no folder {save.parent}")
    trained, model, reached = _start(checkpoint, memory)
    for tokens in tokens_of(trained, file):
        for _, after in iter_nll(trained.net, tokens, reached):
            reached = after
    save_memory(save, reached, model)
    print(f"{save}: {reached.position:,} tokens read, {save.stat().st_size:,} bytes")


def score(
    checkpoint: CheckpointOptions,
    file: str,
    memory: Path | None = None,
    surprise: Path | None = None,
) -> None:
    """Print how well a text is predicted, in total and by position, each token before the model sees it.

    Args:
        checkpoint: of the model.
        file: a UTF-8 text, or - for standard input.
        memory: go on from what was read before.
        surprise: write a line for each token: its position, its text, and the nats that it cost.
    """
    trained, _, reached = _start(checkpoint, memory)
    begin = reached.position
    lengths = torch.from_numpy(token_lengths(trained.tokenizer))
    total, bands = TextMetrics(), MetricsByPosition()
    with open(surprise, "w", encoding="utf-8") if surprise is not None else io.StringIO() as table:
        if surprise is not None:
            table.write("position\ttext\tnats\n")
        for tokens in tokens_of(trained, file):
            done = 0
            for nats, after in iter_nll(trained.net, tokens, reached):
                reached = after
                part = tokens[done : done + len(nats)].astype(np.int64)
                done += len(nats)
                first = reached.position - len(nats)
                scored = slice(1 if first == 0 else 0, None)
                sizes = lengths[torch.from_numpy(part)]
                total.update(nats[scored], sizes[scored])
                bands.update(nats[scored], sizes[scored], first - begin + scored.start)
                if surprise is not None:
                    for offset, (token, cost) in enumerate(zip(part.tolist(), nats.tolist(), strict=True)):
                        table.write(f"{first + offset}\t{trained.tokenizer.decode([token])!r}\t{cost:.5f}\n")
    if not total.tokens:
        raise UserError(f"{file}: a single token, which nothing predicts; give more text, or a --memory")
    print(_line(file, total))
    for start, within in bands.compute().items():
        print(_line(f"  from token {begin + start:,}", within))


def _line(name: str, score: TextMetrics) -> str:
    figures = {key: float(value) for key, value in score.compute().items()}
    return (
        f"{name}: {figures['loss']:.4f} nats/token, {figures['nats_per_char']:.4f} nats/char, "
        f"{figures['bits_per_byte']:.4f} bits/byte ({int(score.tokens):,} tokens)"
    )
