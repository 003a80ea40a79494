"""The project's tokenizers as those of the library ``tokenizers``: the same ids for every text, and the text back."""

from __future__ import annotations

import json

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from mmrec.core.errors import UserError
from mmrec.tokenizers import (
    SEPARATOR_BYTES,
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    byte_alphabet,
)


def fast_tokenizer(tokenizer: Tokenizer) -> HFTokenizer:
    """Return a tokenizer of the library that gives the ids of ``tokenizer``, and decodes them to the same text."""
    if isinstance(tokenizer, CharacterTokenizer):
        ids = {character: index for index, character in enumerate(tokenizer.alphabet)}
        fast = HFTokenizer(models.WordLevel(ids, unk_token=""))  # a character without an id is then an error
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        fast.decoder = decoders.Fuse()
        return fast
    if isinstance(tokenizer, ByteTokenizer):
        ids = {letter: byte for byte, letter in byte_alphabet().items()} | _separator(tokenizer)
        fast = HFTokenizer(models.BPE(ids, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        return fast
    if isinstance(tokenizer, BPETokenizer):
        described = json.loads(tokenizer.state()["model"])
        described["model"]["vocab"] |= _separator(tokenizer)
        return HFTokenizer.from_str(json.dumps(described))
    raise UserError(f"the tokenizer {tokenizer.name} cannot be exported")


def _separator(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the separator of documents, where there is one, by a name that no text is cut into.

    Before it is cut, a text is spelled in letters that stand for bytes. Line ends are none of these letters, but they
    are what the name is decoded to.
    """
    return {} if tokenizer.separator is None else {SEPARATOR_BYTES.decode(): tokenizer.separator}
