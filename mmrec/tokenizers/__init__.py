"""Tokenizers: text to tokens and back. Every token stands for a fixed run of UTF-8 bytes."""

from mmrec.tokenizers.base import (
    PIECE,
    SEPARATOR_BYTES,
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    Tokenizer,
    byte_alphabet,
    last_cut,
    load_tokenizer,
    make_tokenizer,
    token_lengths,
)

__all__ = [
    "PIECE",
    "SEPARATOR_BYTES",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "byte_alphabet",
    "last_cut",
    "load_tokenizer",
    "make_tokenizer",
    "token_lengths",
]
