"""What a plan has to know of a prepared text, and what a compressor makes of it."""

from __future__ import annotations

import numpy as np

from mmrec.data.store import TokenFolder
from mmrec.inference.compressors import xz_size
from mmrec.planning.law import MOST_COUNTED
from mmrec.planning.ngrams import ngram_bits_per_token
from mmrec.planning.plan import Text
from mmrec.tokenizers import token_lengths

PARTS = 100
"""Of a text of which n-grams are counted in a part."""
MOST_COMPRESSED = 4_000_000
"""Bytes of the end of a training text that a compressor reads before the validation text, at about 1 MB a second."""


def describe_text(folder: TokenFolder, xz: float | None = None) -> Text:
    """Return what a plan knows of the text of ``folder``.

    Args:
        folder: has the text.
        xz: bits per byte that xz makes of it, where another folder has told; None where that is to be found.
    """
    lengths = token_lengths(folder.tokenizer)[:, 0]
    val = folder.val[:MOST_COMPRESSED]
    length = float(lengths[val.astype(np.int64)].sum()) / len(val)
    return Text(
        train_tokens=len(folder.train),
        val_tokens=len(folder.val),
        vocab_size=len(lengths),
        bytes_per_token=length,
        xz=xz_bits_per_byte(folder) if xz is None else xz,
        ngram=ngram_bits_per_token(sample(folder.train, MOST_COUNTED), folder.val[:MOST_COUNTED], len(lengths))
        / length,
    )


def sample(tokens: np.ndarray, most: int) -> np.ndarray:
    """Return ``tokens`` [T], or of more than ``most`` :data:`PARTS` parts that are spread evenly over them.

    A training reads from all of a text, so that what its last part alone says of the validation text after it, which
    may be of the same author or hold the same table, is not what the training learns.
    """
    if len(tokens) <= most:
        return tokens
    each = most // PARTS
    begins = np.linspace(0, len(tokens) - each, PARTS).astype(np.int64)
    return np.concatenate([tokens[begin : begin + each] for begin in begins])


def xz_bits_per_byte(folder: TokenFolder) -> float:
    """Return the bits per byte that xz makes of the validation text after the training text, or the ends of both."""
    before, text = texts(folder)
    return 8 * (xz_size(before + text) - xz_size(before)) / len(text)


def texts(folder: TokenFolder, most: int = MOST_COMPRESSED) -> tuple[bytes, bytes]:
    """Return the last ``most`` bytes of the training text, and the first ones of the validation text."""
    return spelled(folder, folder.train[-most:])[-most:], spelled(folder, folder.val[:most])[:most]


def spelled(folder: TokenFolder, tokens: np.ndarray) -> bytes:
    """Return the bytes that ``tokens`` [T] of ``folder`` stand for."""
    each = [folder.tokenizer.token_bytes(token) for token in range(folder.tokenizer.vocab_size)]
    return b"".join(each[token] for token in tokens)
