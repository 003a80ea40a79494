"""The abstract tokenizer: text to tokens and back, every token a fixed run of UTF-8 bytes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

SEPARATOR_BYTES = b"\n\n"
"""What the separator of documents stands for, in text that is written and where bytes are counted."""


class Tokenizer(ABC):
    """A way to cut text into tokens, described in full by a plain dictionary."""

    name: ClassVar[str]
    vocab_size: int
    separator: int | None = None
    """The token that begins each document, where the text is cut into such; :meth:`encode` never gives it."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of ``text`` [T], in :attr:`dtype`."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that ``token`` stands for; one token may be a part of a character."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return strings and numbers that :func:`mmrec.tokenizers.load_tokenizer` makes the same tokenizer from."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest of little-endian uint16 and uint32 that holds every token."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")

    def digest(self) -> str:
        """Return the sha256 of the state: equal for tokenizers that do the same."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return [N, 2], int64: the bytes and the characters of each token, counted at a character's first byte."""
    lengths = np.zeros((tokenizer.vocab_size, 2), dtype=np.int64)
    for token in range(tokenizer.vocab_size):
        spelled = tokenizer.token_bytes(token)
        lengths[token] = len(spelled), sum(byte & 0xC0 != 0x80 for byte in spelled)
    return lengths


def documents_state(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return what the state of ``tokenizer`` says of its separator of documents."""
    return {} if tokenizer.separator is None else {"documents": True}
