"""Byte-level byte-pair encoding (BPE), learned here or taken from another program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.tokenizers.base import SEPARATOR_BYTES, Tokenizer, documents_state
from mmrec.tokenizers.huggingface import load_lossless, why_text_changes
from mmrec.tokenizers.streaming import pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

DEFAULT_BPE_VOCABULARY = 4096


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's byte alphabet), of HF ``tokenizers``.

    :meth:`encode` compares what the tokens stand for with the text: a tokenizer of another program that would lose
    some of it raises UserError with the place.
    """

    name = "bpe"

    def __init__(self, model: str, documents: bool = False) -> None:
        self._tokenizer, self._bytes = load_lossless(model)
        self.vocab_size = len(self._bytes)
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
        parts: list[np.ndarray] = []
        done = 0
        for piece in pieces(text):
            parts.append(self._encode_piece(piece, done))
            done += len(piece)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _encode_piece(self, piece: str, done: int) -> np.ndarray:
        """Return the tokens of ``piece``, which begins at character ``done``; UserError where they lose text."""
        try:
            # Another program's tokenizer may want to begin each text with a token of its own.
            ids = self._tokenizer.encode(piece, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, and worse where the library's Rust panics
            raise UserError(f"the tokenizer cannot encode the text from character {done + 1:,} on: {error}") from None
        spelled = b"".join([self._bytes[token] for token in ids])
        if spelled != piece.encode("utf-8"):
            raise UserError(_first_loss(piece, spelled.decode("utf-8", "replace"), done, self._tokenizer))
        return np.array(ids, dtype=self.dtype)

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "model": self._tokenizer.to_str()} | documents_state(self)


def _first_loss(piece: str, returned: str, done: int, tokenizer: HFTokenizer) -> str:
    """Return the message for a text whose tokens give other text back."""
    places = (place for place, (one, other) in enumerate(zip(piece, returned, strict=False)) if one != other)
    same = next(places, min(len(piece), len(returned)))
    reason = why_text_changes(tokenizer)
    hint = f" (it has {reason}; without, it would keep the text)" if reason else ""
    return (
        f"the tokenizer changes the text: from character {done + same + 1:,} on, "
        f"{piece[max(0, same - 10) : same + 10]!r} comes back as {returned[max(0, same - 10) : same + 10]!r}{hint}"
    )
