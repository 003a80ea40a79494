"""The project's tokenizers in a GGUF file: llama.cpp cuts a text into the same tokens."""

from __future__ import annotations

from gguf import GGUFWriter, TokenType

from mmrec.core.errors import UserError
from mmrec.export.tokenizer import lettered_tokens
from mmrec.tokenizers import CharacterTokenizer, Tokenizer, byte_alphabet

NO_TEXT = 0xFF
"""A byte that no UTF-8 text has: its token is the end of a text, which llama.cpp wants to know one for."""


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    """Write ``tokenizer``; UserError where llama.cpp has none that gives the same tokens."""
    if isinstance(tokenizer, CharacterTokenizer):
        _add_characters(writer, tokenizer.alphabet)
        return
    texts, merges = lettered_tokens(tokenizer, "llama.cpp")
    types = [TokenType.NORMAL] * tokenizer.vocab_size
    no_text = byte_alphabet()[NO_TEXT]
    if merges:
        pre = "gpt-2"
    else:
        # A file without merges is not loaded: this one merges two bytes that no text has. Where it cuts is all one
        # then, and the decoding of this kind leaves spaces alone.
        pre, merges = "qwen2", [f"{no_text} {no_text}"]
    end = texts.index(no_text)
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
