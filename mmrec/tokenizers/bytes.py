"""The tokenizer of bytes: one token a byte of UTF-8."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrec.tokenizers.base import SEPARATOR_BYTES, Tokenizer, documents_state


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: no vocabulary to build, and never an unknown symbol."""

    name = "bytes"

    def __init__(self, documents: bool = False) -> None:
        self.vocab_size = 256 + documents
        self.separator = 256 if documents else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)

    def token_bytes(self, token: int) -> bytes:
        return SEPARATOR_BYTES if token == self.separator else bytes([token])

    def state(self) -> dict[str, Any]:
        return {"name": self.name} | documents_state(self)
