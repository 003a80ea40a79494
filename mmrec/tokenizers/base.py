"""Text to tokens and back. Every token stands for a fixed run of UTF-8 bytes, so bits per byte are exact."""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from mmrec.core.errors import UserError

DEFAULT_BPE_VOCABULARY = 4096
PIECE = 1 << 20
"""Characters that are tokenized at a time."""
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
        """Return what :func:`load_tokenizer` makes the same tokenizer from: strings and numbers only."""

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
                raise UserError(
                    f"the character {text[where]!r} (number {where + 1} of the text) is not in the alphabet of the "
                    f"{self.vocab_size} characters that the model was trained on; leave it out, or train with bytes"
                )
            tokens[start : start + PIECE] = found
        return tokens

    def token_bytes(self, token: int) -> bytes:
        return self.alphabet[token].encode("utf-8", errors="surrogatepass")

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "alphabet": self.alphabet}


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
        return {"name": self.name} | _documents(self)


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's byte alphabet), of HF ``tokenizers``."""

    name = "bpe"

    def __init__(self, model: str, documents: bool = False) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._tokenizer = HFTokenizer.from_str(model)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and worse where its Rust panics
            raise UserError(f"the tokenizer is not a readable HF tokenizers file: {error}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        self._bytes: list[bytes] = []
        for token in range(self.vocab_size):
            letters = self._tokenizer.id_to_token(token)
            if letters is None or not all(letter in byte_of for letter in letters):
                raise UserError(f"the tokenizer is not byte-level BPE: token {token} does not stand for bytes")
            self._bytes.append(bytes(byte_of[letter] for letter in letters))
        if documents:
            self.separator = self.vocab_size
            self.vocab_size += 1
            self._bytes.append(SEPARATOR_BYTES)

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, documents: bool = False) -> BPETokenizer:
        """Learn ``vocab_size`` tokens, at least 256 (and one for a separator), from a text or several."""
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        vocab_size -= documents
        if vocab_size < 256:
            raise UserError(f"--vocab_size {vocab_size} is too small: the 256 bytes are tokens too")
        tokenizer = HFTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        several = [texts] if isinstance(texts, str) else texts
        tokenizer.train_from_iterator((piece for text in several for piece in _pieces(text)), trainer)
        return cls(tokenizer.to_str(), documents)

    def encode(self, text: str) -> np.ndarray:
        # In pieces: the library holds many times its input in memory.
        parts = [self._ids(piece) for piece in _pieces(text)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _ids(self, piece: str) -> np.ndarray:
        # Another program's tokenizer may want to begin each text with a token of its own.
        return np.array(self._tokenizer.encode(piece, add_special_tokens=False).ids, dtype=self.dtype)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "model": self._tokenizer.to_str()} | _documents(self)


class StreamDecoder:
    """Decodes tokens as they come, for a terminal: a character is returned once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

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


TOKENIZERS = ("characters", "bytes", "bpe")


def make_tokenizer(name: str, train: str, val: str, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer ``name`` for a corpus.

    Args:
        name: "characters" (the alphabet is that of both parts, which is nanoGPT's protocol), "bytes", or "bpe"
            (learned from the training part only).
        train: the training part.
        val: the validation part.
        vocab_size: number of tokens, for bpe only.

    Raises:
        UserError: ``vocab_size`` is given for another tokenizer than bpe, or is too small.
    """
    if vocab_size is not None and name != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer bpe; {name} has as many tokens as the text needs")
    if name == "characters":
        return CharacterTokenizer(train + val)
    if name == "bytes":
        return ByteTokenizer()
    return BPETokenizer.train(train, DEFAULT_BPE_VOCABULARY if vocab_size is None else vocab_size)


def load_tokenizer(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that ``state`` describes; UserError where it describes none."""
    match state:
        case {"name": "characters", "alphabet": str(alphabet)} if alphabet:
            return CharacterTokenizer(alphabet)
        case {"name": "bytes"}:
            return ByteTokenizer(state.get("documents") is True)
        case {"name": "bpe", "model": str(model)}:
            return BPETokenizer(model, state.get("documents") is True)
    raise UserError(f"not a tokenizer of this program: {str(state)[:80]}")


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return [N, 2], int64: the bytes and the characters of each token, counted at a character's first byte."""
    lengths = np.zeros((tokenizer.vocab_size, 2), dtype=np.int64)
    for token in range(tokenizer.vocab_size):
        spelled = tokenizer.token_bytes(token)
        lengths[token] = len(spelled), sum(byte & 0xC0 != 0x80 for byte in spelled)
    return lengths


def _documents(tokenizer: Tokenizer) -> dict[str, bool]:
    return {} if tokenizer.separator is None else {"documents": True}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: itself where it prints, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


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


def _pieces(text: str) -> Iterable[str]:
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
