"""Tokenizers: text to tokens and back. Every token stands for a fixed run of UTF-8 bytes."""

from mmrec.tokenizers.base import SEPARATOR_BYTES, Tokenizer, token_lengths
from mmrec.tokenizers.bpe import BPETokenizer
from mmrec.tokenizers.bytes import ByteTokenizer
from mmrec.tokenizers.characters import CharacterTokenizer
from mmrec.tokenizers.huggingface import byte_alphabet
from mmrec.tokenizers.loading import TOKENIZERS, load_tokenizer, make_tokenizer
from mmrec.tokenizers.streaming import PIECE, StreamDecoder, last_cut, pending_bytes

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
    "pending_bytes",
    "token_lengths",
]
