"""Tokenizer files of other programs in small: byte-level BPE and SentencePiece, changed in any of their parts."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = "To be, or not to be: the question always was. \u4e16\u754c d\u00e9j\u00e0 vu \U0001f600\n" * 20


def byte_level(size: int = 300, alphabet: bool = True) -> dict[str, Any]:
    """The content of a tokenizer.json of byte-level BPE, as GPT-2's; without all bytes where no alphabet is given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=letters)
    )
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def added(number: int, content: str, **options: bool) -> dict[str, Any]:
    """An added token of a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **flags, **options}


def sentencepiece(prepend: bool = False, fallback: bool = True) -> dict[str, Any]:
    """The content of a tokenizer.json of SentencePiece BPE with byte fallback, as Gemma's (Llama 2's prepends)."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    pieces += sorted({letter for letter in WORDS.replace(" ", "\u2581") if letter not in "\n\u4e16"})
    pieces += ["\u2581t", "\u2581to", "be"]
    pairs = [["\u2581", "t"], ["\u2581t", "o"], ["b", "e"]]
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    if prepend:
        normalizers.insert(0, {"type": "Prepend", "prepend": "\u2581"})
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": fallback, "ignore_merges": False}
    model |= {"vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": pairs}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
