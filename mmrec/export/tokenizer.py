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
"""What GPT-2's BPE is, by the names of a tokenizer.json."""


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


def lettered_tokens(tokenizer: Tokenizer, program: str) -> tuple[list[str], list[str]]:
    """Return the tokens in letters that stand for bytes, "" for the separator, and the merges of GPT-2's kind.

    Args:
        tokenizer: of bytes, or a BPE.
        program: that is to cut texts by them.

    Raises:
        UserError: it cuts a text in a way that ``program`` does not have.
    """
    if isinstance(tokenizer, ByteTokenizer):
        ids, merges = {letter: byte for byte, letter in byte_alphabet().items()}, list[str]()
    elif isinstance(tokenizer, BPETokenizer):
        ids, merges = _plain_bpe(tokenizer, program)
    else:
        raise UserError(f"the tokenizer {tokenizer.name}: {program} has none like it")
    tokens = [""] * tokenizer.vocab_size
    for letters, token in ids.items():
        tokens[token] = letters
    return tokens, merges


def _plain_bpe(tokenizer: BPETokenizer, program: str) -> tuple[dict[str, int], list[str]]:
    """Return ids by letters, and merges, of a BPE of GPT-2's kind."""
    described = json.loads(tokenizer.state()["model"])
    model, cut = described["model"], described["pre_tokenizer"] or {}
    as_ours = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = all(model.get(name, allowed[0]) in allowed for name, allowed in PLAIN_BPE.items())
    if not plain or described["normalizer"] or described["added_tokens"] or as_ours.items() - cut.items():
        raise UserError(f"the tokenizer does not cut a text as GPT-2's does; {program} has none like it")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids: dict[str, int] = model["vocab"]
    return ids, merges
