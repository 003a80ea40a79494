"""Byte-level byte-pair encoding (BPE), learned here or taken from another program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.tokenizers.base import SEPARATOR_BYTES, Tokenizer, documents_state
from mmrec.tokenizers.streaming import pieces

DEFAULT_BPE_VOCABULARY = 4096


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
        tokenizer.train_from_iterator((piece for text in several for piece in pieces(text)), trainer)
        return cls(tokenizer.to_str(), documents)

    def encode(self, text: str) -> np.ndarray:
        # In pieces: the library holds many times its input in memory.
        parts = [self._ids(piece) for piece in pieces(text)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _ids(self, piece: str) -> np.ndarray:
        # Another program's tokenizer may want to begin each text with a token of its own.
        return np.array(self._tokenizer.encode(piece, add_special_tokens=False).ids, dtype=self.dtype)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "model": self._tokenizer.to_str()} | documents_state(self)


def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: itself where it prints, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
