"""``mmrec read`` and ``mmrec score``: a text of any length in constant memory, kept as a state or scored by token."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import save_memory
from mmrec.core.errors import UserError
from mmrec.inference.metrics import MetricsByPosition, TextMetrics
from mmrec.inference.reading import iter_nll, load_model_and_state
from mmrec.inference.text_input import iter_file_tokens
from mmrec.tokenizers import token_lengths


def read(checkpoint: CheckpointOptions, file: str, save: Path, memory: Path | None = None) -> None:
    """Read a text of any length and keep the state after it, to go on from by generate, score or another read.

    Args:
        checkpoint: of the model.
        file: a UTF-8 text, or - for standard input.
        save: the file to write.
        memory: go on from what was read before.
    """
    if not save.absolute().parent.is_dir():  # found out now, not after hours of reading
        raise UserError(f"{save}: cannot be written: there is no folder {save.parent}")
    trained, digest, reached = load_model_and_state(checkpoint, memory)
    for tokens in iter_file_tokens(trained.tokenizer, file):
        for _, after in iter_nll(trained.net, tokens, reached):
            reached = after
    save_memory(save, reached, digest)
    print(f"{save}: {reached.position:,} tokens read, {save.stat().st_size:,} bytes")


def score(
    checkpoint: CheckpointOptions, file: str, memory: Path | None = None, token_nll: Path | None = None
) -> None:
    """Print how well a text is predicted, in total and by position, each token before the model sees it.

    Args:
        checkpoint: of the model.
        file: a UTF-8 text, or - for standard input.
        memory: go on from what was read before.
        token_nll: write a table to this file, a line for each token: its position, its text, and its negative
            log-likelihood in nats.
    """
    trained, _, reached = load_model_and_state(checkpoint, memory)
    begin = reached.position
    lengths = torch.from_numpy(token_lengths(trained.tokenizer))
    total, by_position = TextMetrics(), MetricsByPosition()
    with open(token_nll, "w", encoding="utf-8") if token_nll is not None else io.StringIO() as table:
        if token_nll is not None:
            table.write("position\ttext\tnll\n")
        for tokens in iter_file_tokens(trained.tokenizer, file):
            done = 0
            for nll, after in iter_nll(trained.net, tokens, reached):
                reached = after
                chunk = tokens[done : done + len(nll)].astype(np.int64)
                done += len(nll)
                first = reached.position - len(nll)
                scored = slice(1 if first == 0 else 0, None)
                sizes = lengths[torch.from_numpy(chunk)]
                total.update(nll[scored], sizes[scored])
                by_position.update(nll[scored], sizes[scored], first - begin + scored.start)
                if token_nll is not None:
                    for offset, (token, value) in enumerate(zip(chunk.tolist(), nll.tolist(), strict=True)):
                        table.write(f"{first + offset}\t{trained.tokenizer.decode([token])!r}\t{value:.5f}\n")
    if not total.tokens:
        raise UserError(f"{file}: a single token, which nothing predicts; give more text, or a --memory")
    print(_line(file, total))
    for start, metrics in by_position.compute().items():
        print(_line(f"  from token {begin + start:,}", metrics))


def _line(name: str, metrics: TextMetrics) -> str:
    figures = {key: float(value) for key, value in metrics.compute().items()}
    return (
        f"{name}: {figures['loss']:.4f} nats/token, {figures['nats_per_char']:.4f} nats/char, "
        f"{figures['bits_per_byte']:.4f} bits/byte ({int(metrics.tokens):,} tokens)"
    )
