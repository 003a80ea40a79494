"""The project's tokenizers in a GGUF file: llama.cpp cuts a text into the same tokens."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from mmrec.core.errors import UserError
from mmrec.tokenizers import BPETokenizer, ByteTokenizer, CharacterTokenizer, Tokenizer, byte_alphabet

NO_TEXT = 0xFF
"""A byte that no UTF-8 text has: its token is the end of a text, which llama.cpp wants to know one for."""
PLAIN_BPE = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
"""What a BPE has to be for llama.cpp's to be the same, by the names of a tokenizer.json."""


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    """Write ``tokenizer``; UserError where llama.cpp has none that gives the same tokens."""
    if isinstance(tokenizer, CharacterTokenizer):
        _add_characters(writer, tokenizer.alphabet)
        return
    letters = byte_alphabet()
    if isinstance(tokenizer, ByteTokenizer):
        # A file without merges is not loaded: this one merges two bytes that no text has.
        ids, merges = {letters[byte]: byte for byte in range(256)}, [f"{letters[NO_TEXT]} {letters[NO_TEXT]}"]
        pre = "qwen2"  # where it cuts is all one without merges, and its decoding leaves spaces alone
    elif isinstance(tokenizer, BPETokenizer):
        ids, merges = _plain_bpe(tokenizer)
        pre = "gpt-2"
    else:
        raise UserError(f"--format gguf: the tokenizer {tokenizer.name} has no form in GGUF")
    texts: list[Any] = [None] * tokenizer.vocab_size
    types = [TokenType.NORMAL] * tokenizer.vocab_size
    for letter, token in ids.items():
        texts[token] = letter
    end = ids[letters[NO_TEXT]]
    if tokenizer.separator is not None:
        end = tokenizer.separator
        texts[end], types[end] = "\n\n", TokenType.CONTROL  # as no text is spelled here
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _add_characters(writer: GGUFWriter, alphabet: str) -> None:
    """Write an alphabet as RWKV's tokenizer, which takes the longest token at each place."""
    foreign = next((character for character in alphabet if not character.isascii()), None)
    if foreign is not None:
        # Past a first byte that it knows and a second that it does not, llama.cpp would search for ever.
        raise UserError(
            f"--format gguf: the tokenizer's alphabet has {foreign!r}, and llama.cpp has no tokenizer by characters "
            "beyond ASCII; train on a text that was prepared with --tokenizer bytes or bpe"
        )
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([_escaped(character) for character in alphabet])
    writer.add_token_types([TokenType.NORMAL] * len(alphabet))


def _escaped(character: str) -> str:
    plain = character.isprintable() and character != "\\"
    return character if plain else f"\\x{ord(character):02x}"


def _plain_bpe(tokenizer: BPETokenizer) -> tuple[dict[str, int], list[str]]:
    """Return the ids of the tokens and the merges of a BPE that cuts a text as GPT-2's does."""
    described = json.loads(tokenizer.state()["model"])
    model, cut = described["model"], described["pre_tokenizer"] or {}
    as_ours = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = all(model.get(name, allowed[0]) in allowed for name, allowed in PLAIN_BPE.items())
    if not plain or described["normalizer"] or described["added_tokens"] or as_ours.items() - cut.items():
        raise UserError(
            "--format gguf: the tokenizer does not cut a text as GPT-2's does; llama.cpp has none like it"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids: dict[str, int] = model["vocab"]
    return ids, merges
