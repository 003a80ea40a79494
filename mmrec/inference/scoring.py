"""``mmrec read`` and ``mmrec score``: a text of any length in constant memory, kept as a state or scored by token."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import check_memory_target, save_memory
from mmrec.core.errors import UserError
from mmrec.core.files import refuse_to_replace
from mmrec.core.threads import use_threads
from mmrec.inference.compressors import Compressors
from mmrec.inference.metrics import MetricsByPosition, TextMetrics
from mmrec.inference.reading import READ_CHUNK, CacheOptions, LearnOptions, Reader, load_model_and_state
from mmrec.inference.text_input import iter_file_tokens
from mmrec.tokenizers import token_lengths

NLL_HEADER = "position\ttext\tnll\n"
"""First line of the table of ``--token_nll``."""


def read(
    checkpoint: CheckpointOptions,
    learning: LearnOptions,
    counting: CacheOptions,
    file: str,
    save: Path,
    memory: Path | None = None,
) -> None:
    """Read a text of any length and keep what was read, to go on from by generate, score or another read.

    Args:
        checkpoint: of the model.
        learning: whether the model learns from the text.
        counting: whether its n-grams are counted.
        file: a UTF-8 text, or - for standard input.
        save: the file to write.
        memory: go on from what was read before.
    """
    if not save.absolute().parent.is_dir():  # found out now, not after hours of reading
        raise UserError(f"{save}: cannot be written: there is no folder {save.parent}")
    check_memory_target(save)
    trained, digest, reached = load_model_and_state(checkpoint, memory)
    use_threads(trained.net.config.dim, READ_CHUNK)
    begun = learning.applied(trained.net, reached)
    reader = Reader(trained.net, counting.applied(trained.net, begun, trained.tokenizer))
    for tokens in iter_file_tokens(trained.tokenizer, file):
        for _ in reader.read(tokens):
            pass
    save_memory(save, reader.memory, digest)
    learned = ", learned from" if reader.memory.learned is not None else ""
    counted = ", n-grams counted" if reader.memory.cached is not None else ""
    print(f"{save}: {reader.memory.position:,} tokens read{learned}{counted}, {save.stat().st_size:,} bytes")


def score(
    checkpoint: CheckpointOptions,
    learning: LearnOptions,
    counting: CacheOptions,
    file: str,
    memory: Path | None = None,
    token_nll: Path | None = None,
    beside: bool = False,
    beside_after: Path | None = None,
) -> None:
    """Print how well a text is predicted, in total and by position, each token before the model sees it.

    Args:
        checkpoint: of the model.
        learning: whether the model learns from the text.
        counting: whether its n-grams are counted.
        file: a UTF-8 text, or - for standard input.
        memory: go on from what was read before.
        token_nll: write a table to this file, a line for each token: its position, its text, and its negative
            log-likelihood in nats.
        beside: print what xz and PPMd take for the text, too.
        beside_after: the same, after they have read this file: what the model was trained on, or has read.
    """
    if token_nll is not None:
        refuse_to_replace(token_nll, NLL_HEADER.encode(), "such a table", "--token_nll")
    compressors = Compressors(beside_after) if beside or beside_after is not None else None
    trained, _, before = load_model_and_state(checkpoint, memory)
    use_threads(trained.net.config.dim, READ_CHUNK)
    begin = before.position
    begun = learning.applied(trained.net, before)
    reader = Reader(trained.net, counting.applied(trained.net, begun, trained.tokenizer))
    lengths = torch.from_numpy(token_lengths(trained.tokenizer))
    total, by_position = TextMetrics(), MetricsByPosition()
    with open(token_nll, "w", encoding="utf-8") if token_nll is not None else io.StringIO() as table:
        if token_nll is not None:
            table.write(NLL_HEADER)
        for part in (part for tokens in iter_file_tokens(trained.tokenizer, file) for part in reader.read(tokens)):
            nll, first, scored = part.nll, part.memory.position - len(part.tokens), part.scored
            sizes = lengths[part.tokens]
            total.update(nll[scored], sizes[scored])
            if compressors is not None:
                compressors.update(b"".join(map(trained.tokenizer.token_bytes, part.tokens.tolist())))
            by_position.update(nll[scored], sizes[scored], first - begin + scored.start)
            if token_nll is not None:
                for offset, (token, value) in enumerate(zip(part.tokens.tolist(), nll.tolist(), strict=True)):
                    table.write(f"{first + offset}\t{trained.tokenizer.decode([token])!r}\t{value:.5f}\n")
    if not total.tokens:
        raise UserError(f"{file}: a single token, which nothing predicts; give more text, or a --memory")
    print(_line(file, total))
    for start, metrics in by_position.compute().items():
        print(_line(f"  from token {begin + start:,}", metrics))
    for name, bits in compressors.compute().items() if compressors is not None else ():
        print(f"  {name}: {bits:.4f} bits/byte")


def _line(name: str, metrics: TextMetrics) -> str:
    figures = {key: float(value) for key, value in metrics.compute().items()}
    return (
        f"{name}: {figures['loss']:.4f} nats/token, {figures['nats_per_char']:.4f} nats/char, "
        f"{figures['bits_per_byte']:.4f} bits/byte ({int(metrics.tokens):,} tokens)"
    )
