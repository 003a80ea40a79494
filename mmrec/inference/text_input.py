"""Texts as the commands take them: a file or standard input, of any length, tokenized piece by piece."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from mmrec.core.errors import UserError
from mmrec.core.text_files import is_unicode
from mmrec.tokenizers import PIECE, Tokenizer, last_cut


def iter_pieces(file: IO[str], size: int = PIECE) -> Iterator[str]:
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


@contextmanager
def open_text(path: str) -> Iterator[tuple[IO[str], int | None]]:
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


def iter_file_tokens(tokenizer: Tokenizer, path: str) -> Iterator[np.ndarray]:
    """Yield the tokens of a file piece by piece, with a progress bar; UserError where it is no UTF-8 text."""
    with (
        open_text(path) as (file, size),
        tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()) as bar,
    ):
        is_empty = True
        try:
            for piece in iter_pieces(file):
                if not is_unicode(piece):
                    raise UserError(f"{path}: is not UTF-8")
                yield tokenizer.encode(piece)
                is_empty = False
                bar.update(len(piece.encode("utf-8")))
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
        if is_empty:
            raise UserError(f"{path}: is empty")


def read_standard_input() -> str:
    """Return all of standard input, without a byte order mark and without the line end that a shell puts after it."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"-: is not UTF-8 text at byte {error.start:,}") from None
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
