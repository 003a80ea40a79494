"""Making a tokenizer by name, loading one from its state, and reading one from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmrec.core.errors import UserError, nearest
from mmrec.tokenizers.base import Tokenizer
from mmrec.tokenizers.bpe import DEFAULT_BPE_VOCABULARY, BPETokenizer
from mmrec.tokenizers.bytes import ByteTokenizer
from mmrec.tokenizers.characters import CharacterTokenizer

FILE = "tokenizer.json"
"""Its name in a token folder, and in the models of Hugging Face."""
PROBE = "a b\n"
"""Text that a tokenizer has to give back to be of any use; what else it changes is seen in the text that is read."""
OTHER_FILES = {".model": "a SentencePiece model", ".vocab": "a SentencePiece vocabulary", ".tiktoken": "tiktoken"}
"""Files of tokenizers that transformers converts to a tokenizer.json."""

TOKENIZERS = ("characters", "bytes", "bpe")
"""The tokenizers by name."""


def make_tokenizer(name: str, train: str, val: str, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer ``name`` for a corpus.

    Args:
        name: "characters" (the alphabet is that of both parts, which is nanoGPT's protocol), "bytes", or "bpe"
            (learned from the training part only).
        train: the training part.
        val: the validation part.
        vocab_size: number of tokens, for bpe only.

    Raises:
        UserError: ``vocab_size`` is given for another tokenizer than bpe, or is too small.
    """
    if vocab_size is not None and name != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer bpe; {name} has as many tokens as the text needs")
    if name == "characters":
        return CharacterTokenizer(train + val)
    if name == "bytes":
        return ByteTokenizer()
    return BPETokenizer.train(train, DEFAULT_BPE_VOCABULARY if vocab_size is None else vocab_size)


def load_tokenizer(state: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that ``state`` describes; UserError where it describes none."""
    match state:
        case {"name": "characters", "alphabet": str(alphabet)} if alphabet:
            return CharacterTokenizer(alphabet)
        case {"name": "bytes"}:
            return ByteTokenizer(state.get("documents") is True)
        case {"name": "bpe", "model": str(model)}:
            return BPETokenizer(model, state.get("documents") is True)
    raise UserError(f"not a tokenizer of this program: {str(state)[:80]}")


def read_tokenizer(path: Path, documents: bool = False) -> Tokenizer:
    """Return the tokenizer that is kept in ``path``.

    Args:
        path: a token folder; a model that ``mmrec export --format safetensors`` wrote; or a tokenizer.json, ours or a
            byte-level BPE in the form of HF ``tokenizers``, as GPT-2's.
        documents: it has to have a token that begins each document; another program's is given one.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        hint = nearest(str(path), TOKENIZERS)
        raise UserError(f"{path}: no such tokenizer file, and no name; known: {', '.join(TOKENIZERS)}{hint}")
    if path.suffix in OTHER_FILES or path.name == "vocab.txt":
        raise UserError(
            f"{path}: is {OTHER_FILES.get(path.suffix, 'a WordPiece vocabulary')}; convert it first: "
            f"transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT) writes a tokenizer.json"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                text = (file.metadata() or {}).get("tokenizer", "")
        else:
            text = path.read_text(encoding="utf-8")
        state: Any = json.loads(text)
    except (SafetensorError, OSError, ValueError):
        raise UserError(f"{path}: holds no tokenizer") from None
    try:
        if isinstance(state, dict) and "name" in state:
            tokenizer = load_tokenizer(state)
            if documents and tokenizer.separator is None:
                raise UserError("the tokenizer has no token that begins a document, as a large corpus needs one")
            return tokenizer
        tokenizer = BPETokenizer(text, documents)
        tokenizer.encode(PROBE)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer
