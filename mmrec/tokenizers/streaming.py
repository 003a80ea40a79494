"""Text as it comes: a decoder of streamed tokens, and long texts cut into pieces that are tokenized one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from mmrec.tokenizers.base import Tokenizer

PIECE = 1 << 20
"""Characters that are tokenized at a time."""


class StreamDecoder:
    """Decodes tokens as they come, for a terminal: a character is returned once all its bytes are there.

    Args:
        tokenizer: of the tokens.
        pending: bytes of a character that had begun before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, pending: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(pending)

    @property
    def pending(self) -> bytes:
        """The bytes of a character whose other bytes are still to come."""
        return self._decoder.getstate()[0]

    @property
    def inside(self) -> bool:
        """Whether a character has begun whose other bytes are still to come."""
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, maybe none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what is left when the text ends inside a character."""
        return self._decoder.decode(b"", final=True)


def pending_bytes(tokenizer: Tokenizer, pending: bytes, tokens: Sequence[int]) -> bytes:
    """Return the bytes of the character that ``tokens`` leave incomplete, where ``pending`` stood before them."""
    last = tokens[-4:]  # no character has more bytes than four, and no token has none
    decoder = StreamDecoder(tokenizer, pending if len(last) < 4 else b"")
    for token in last:
        decoder.push(int(token))
    return decoder.pending


def last_cut(text: str, start: int, end: int) -> int:
    """Return the last place between ``start`` and ``end`` where ``text`` may be cut; ``start`` where there is none.

    GPT-2's rule for words joins no white space to a word before it, but it does join white space: a cut is right
    before the first of several. Line ends, of either kind, are looked for first.
    """
    for mark in ("\n", " "):
        cut = text.rfind(mark, start + 1, end)
        while cut > start:
            cut -= text[cut - 1] == "\r"
            if cut > start and not text[cut - 1].isspace():
                return cut
            cut = text.rfind(mark, start + 1, cut)
    return start


def pieces(text: str) -> Iterable[str]:
    """Cut ``text`` into pieces of about :data:`PIECE` characters that encode to the same tokens as the whole.

    Where so many have no white space among them, the cut is anywhere.
    """
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        if end < len(text) and (cut := last_cut(text, start, end)) > start:
            end = cut
        yield text[start:end]
        start = end
