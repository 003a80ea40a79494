"""The tokenizer of characters: one token a character of a fixed alphabet."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.tokenizers.base import Tokenizer
from mmrec.tokenizers.streaming import PIECE

AROUND = 12
"""Characters on either side of one that is not known by which it is found in its text."""


class CharacterTokenizer(Tokenizer):
    """One token a character of a fixed alphabet, in code-point order, as nanoGPT's character data."""

    name = "characters"

    def __init__(self, alphabet: str) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        self.vocab_size = len(self.alphabet)
        self._points = _code_points(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        tokens = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), PIECE):  # what is looked up takes many times the room of the text
            points = _code_points(text[start : start + PIECE])
            found = np.searchsorted(self._points, points)
            known = self._points[np.minimum(found, self.vocab_size - 1)] == points
            if not known.all():
                where = start + int(np.argmin(known))
                around = text[max(0, where - AROUND) : where + AROUND + 1]
                raise UserError(
                    f"the character {text[where]!r} (in {around!r}) is not in the alphabet of the "
                    f"{self.vocab_size} characters that the model was trained on; leave it out, or train with bytes"
                )
            tokens[start : start + PIECE] = found
        return tokens

    def token_bytes(self, token: int) -> bytes:
        return self.alphabet[token].encode("utf-8", errors="surrogatepass")

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "alphabet": self.alphabet}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
