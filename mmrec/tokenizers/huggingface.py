"""Files of HF ``tokenizers`` (tokenizer.json), read so that every token stands for fixed bytes and no text is lost.

Two forms are read: byte-level BPE, where a token is spelled in GPT-2's alphabet of 256 letters, one a byte; and
SentencePiece with byte fallback, where "\u2581" is a space and ``<0x0A>`` a byte. What would lose text is switched
off (truncation, padding, dropout, white space that an added token swallows) or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmrec.core.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

SPACE = "\u2581"
"""SentencePiece's letter for a space."""
MOST_HOLES = 4096
"""Ids without a token that a file may have, below its largest id."""
CHANGES_TEXT = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "BertNormalizer", "Nmt"}
CHANGES_TEXT |= {"Precompiled", "Prepend", "Replace"}
"""Normalizers that may give other text than they were given."""


def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: itself where it prints, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def load_lossless(model: str) -> tuple[HFTokenizer, list[bytes]]:
    """Return the tokenizer that ``model``, the text of a tokenizer.json, describes, and the bytes of each token.

    Raises:
        UserError: the file cannot be read, or a token does not stand for fixed bytes, or a byte has no token.
    """
    from tokenizers import Tokenizer as HFTokenizer

    try:
        described = json.loads(model)
        form = form_of(described)
        _switch_off_loss(described, form)
        tokenizer = HFTokenizer.from_str(json.dumps(described))
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=False)
        added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # the library raises bare Exception, and worse where its Rust panics
        raise UserError(f"the tokenizer is not a readable HF tokenizers file: {error}") from None
    size = max([*vocabulary.values(), *added], default=-1) + 1
    if size > len(vocabulary) + len(added) + MOST_HOLES:
        raise UserError(f"the tokenizer has {len(vocabulary):,} tokens, and ids up to {size:,}: it is damaged")
    spell = _spell_bytes if form == "byte-level" else _spell_sentencepiece
    table = [b""] * size  # an id without a token stands for nothing
    alphabet = {letter: byte for byte, letter in byte_alphabet().items()}
    for content, token in vocabulary.items():
        table[token] = spell(content, alphabet)
    letters = byte_alphabet() if form == "byte-level" else {byte: f"<0x{byte:02X}>" for byte in range(256)}
    if missing := [byte for byte, letter in sorted(letters.items()) if letter not in vocabulary]:
        some = ", ".join(f"0x{byte:02X}" for byte in missing[:3])
        raise UserError(
            f"the tokenizer has no token for {len(missing)} of the 256 bytes ({some}): text would be lost; train it "
            f"with all of them as its initial alphabet, or use --tokenizer bpe"
        )
    for token, content in added.items():
        table[token] = content.content.encode("utf-8")
    return tokenizer, table


def form_of(described: Any) -> str:
    """Return "byte-level" or "sentencepiece" for the content of a tokenizer.json.

    Raises:
        UserError: it is of another form; the message names it, and how to go on.
    """
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        raise UserError("the tokenizer is not a readable HF tokenizers file: it has no model")
    model = described["model"]
    around = [described.get(part) for part in ("normalizer", "pre_tokenizer")]
    types = {part["type"] for place in around for part in parts_of(place)}
    if "ByteLevel" in types and model.get("type", "BPE") == "BPE":
        return "byte-level"
    if model.get("type", "BPE") in ("BPE", "Unigram") and model.get("byte_fallback") is True:
        return "sentencepiece"
    name = {"WordPiece": "WordPiece", "Unigram": "SentencePiece (Unigram) without byte fallback"}
    kind = name.get(str(model.get("type")), f"{model.get('type', 'BPE')} without bytes")
    raise UserError(
        f"the tokenizer is not byte-level BPE but {kind}, which loses text; it cannot be converted: learn one of the "
        f"same size by --tokenizer bpe --vocab_size {len(model.get('vocab') or ()) or 4096}"
    )


def parts_of(place: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer, a pre-tokenizer or a decoder, those of a sequence one by one."""
    if isinstance(place, dict):
        yield {"type": "", **place}
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in place.get(key) or ():
                yield from parts_of(inner)


def why_text_changes(tokenizer: HFTokenizer) -> str:
    """Return the parts of a tokenizer that may change text, for an error message; empty where there are none."""
    described = json.loads(tokenizer.to_str())
    found = [part["type"] for part in parts_of(described.get("normalizer")) if part["type"] in CHANGES_TEXT]
    for part in parts_of(described.get("pre_tokenizer")):
        if part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never":
            found.append(f"{part['type']} with a space before the text")
        if part["type"] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer") or part.get("behavior") == "Removed":
            found.append(f"{part['type']}, which drops what it splits at")
    return ", ".join(dict.fromkeys(found))


def _switch_off_loss(described: dict[str, Any], form: str) -> None:
    """Change ``described`` in place: nothing is cut off, filled up, drawn at random or swallowed."""
    described["truncation"] = described["padding"] = None
    if "dropout" in described["model"]:
        described["model"]["dropout"] = None
    vocabulary = described["model"].get("vocab")
    letters = set(byte_alphabet().values()) if form == "byte-level" and isinstance(vocabulary, dict) else set()
    kept = []
    for token in described.get("added_tokens") or ():
        token["lstrip"] = token["rstrip"] = False
        # A token of the model that is spelled in letters for bytes, added again: as text it would be other bytes.
        content = token["content"]
        if not (letters and content in vocabulary and not content.isascii() and letters >= set(content)):
            kept.append(token)
    described["added_tokens"] = kept


def _spell_bytes(content: str, alphabet: dict[str, int]) -> bytes:
    """Return the bytes of a token in GPT-2's letters; one that is not in these is never cut: its own UTF-8."""
    if all(letter in alphabet for letter in content):
        return bytes(alphabet[letter] for letter in content)
    return content.encode("utf-8")


def _spell_sentencepiece(content: str, alphabet: dict[str, int]) -> bytes:
    """Return the bytes of a token of SentencePiece."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", content):
        return bytes([int(content[3:5], 16)])
    return content.replace(SPACE, " ").encode("utf-8")
