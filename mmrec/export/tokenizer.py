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
from mmrec.tokenizers.huggingface import SPACE, form_of


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
        return _fast_bpe(tokenizer)
    raise UserError(f"the tokenizer {tokenizer.name} cannot be exported")


def _fast_bpe(tokenizer: BPETokenizer) -> HFTokenizer:
    """Return the library's tokenizer of ``tokenizer``, which may come from another program."""
    described = json.loads(tokenizer.state()["model"])
    # Added tokens keep their ids only where the vocabulary has them, too.
    contents = {token["content"]: token["id"] for token in described["added_tokens"]}
    described["model"]["vocab"] |= contents | _separator(tokenizer)
    fast = HFTokenizer.from_str(json.dumps(described))
    if form_of(described) == "byte-level":
        fast.decoder = decoders.ByteLevel()
    else:
        fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for content, token in contents.items():
        if fast.decode([token], skip_special_tokens=False).encode() != tokenizer.token_bytes(token):
            raise UserError(f"the tokenizer cannot be exported: its added token {content!r} is decoded as other text")
    return fast


def _separator(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the separator of documents, where there is one, by a name that no text is cut into.

    Before it is cut, a text is spelled in letters that stand for bytes. Line ends are none of these letters, but they
    are what the name is decoded to.
    """
    return {} if tokenizer.separator is None else {SEPARATOR_BYTES.decode(): tokenizer.separator}
