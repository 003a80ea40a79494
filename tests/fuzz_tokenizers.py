"""Tokenizers of other programs to fuzz: whatever they do to a text, it is kept byte for byte or refused."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from foreign_tokenizers import added, byte_level, sentencepiece
from fuzzing import ANY_TEXT, altered
from hypothesis import strategies as st

from mmrec.core.errors import UserError
from mmrec.data.options import PrepareOptions
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.tokenize_shard import tokenize
from mmrec.data.prepare import prepare
from mmrec.tokenizers import BPETokenizer, load_tokenizer, token_lengths
from mmrec.tokenizers.loading import read_tokenizer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONTENTS = st.sampled_from(
    ["  ", " ", "\n", "<mask>", "\u00e9", "caf\u00e9", "\u2581", "<a b>", "\u0120", "be", "\ufb01"]
)
NORMALIZERS: list[Any] = [None, *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "Lowercase", "StripAccents"))]
NORMALIZERS += [{"type": "Prepend", "prepend": " "}, {"type": "Strip", "strip_left": True, "strip_right": True}]
NORMALIZERS += [{"type": "Replace", "pattern": {"String": "a"}, "content": "b"}]
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRETOKENIZERS: list[Any] = [
    BYTES,
    BYTES | {"add_prefix_space": True},
    BYTES | {"use_regex": False},
    {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]},
    {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Isolated"}, BYTES]},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
]


@cache
def bases() -> list[str]:
    """The contents that are changed, as JSON: most tokenizers have all bytes."""
    kinds = [byte_level(), byte_level(), byte_level(alphabet=False), sentencepiece(), sentencepiece(prepend=True)]
    return [json.dumps(kind) for kind in kinds]


def foreign(data: st.DataObject) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a tokenizer.json, and texts that its added tokens stand for."""
    described: dict[str, Any] = json.loads(data.draw(st.sampled_from(bases())))
    vocabulary = described["model"]["vocab"]
    some = data.draw(st.lists(CONTENTS | ANY_TEXT.filter(bool), max_size=3, unique=True))
    described["added_tokens"] = [
        added(vocabulary.get(content, len(vocabulary) + number), content, **dict.fromkeys(data.draw(flags), True))
        for number, content in enumerate(some)
    ]
    if data.draw(st.booleans()):
        direction = data.draw(st.sampled_from(["Left", "Right"]))
        length = data.draw(st.integers(0, 5))
        described["truncation"] = {
            "direction": direction,
            "max_length": length,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    described["model"]["dropout"] = data.draw(st.sampled_from([None, None, 0.1, 1.0]))
    if vocabulary and "<0x00>" not in vocabulary:
        described["pre_tokenizer"] = data.draw(st.sampled_from(PRETOKENIZERS))
        described["normalizer"] = data.draw(st.sampled_from(NORMALIZERS))
    if data.draw(st.integers(0, 4)) == 0:  # a byte without a token
        vocabulary.pop(data.draw(st.sampled_from(sorted(vocabulary))))
    return described, some


flags = st.lists(st.sampled_from(FLAGS), unique=True)


def foreign_tokenizer(data: st.DataObject) -> None:
    """A tokenizer of another program gives every text back byte for byte, or the text or the tokenizer is refused."""
    described, some = foreign(data)
    if data.draw(st.integers(0, 9)) == 0:
        described = altered(described, data)
    words = st.sampled_from([*some, " ", "\n", "To be", "caf\u00e9", "e\u0301", "\u754c", "AB"])
    text = "".join(data.draw(st.lists(words | ANY_TEXT, max_size=8)))
    try:
        tokenizer = BPETokenizer(json.dumps(described), data.draw(st.booleans()))
        tokens = tokenizer.encode(text)
    except UserError:
        return
    assert b"".join(tokenizer.token_bytes(int(token)) for token in tokens) == text.encode()
    assert tokenizer.decode(tokens) == text
    assert token_lengths(tokenizer)[tokens].sum(axis=0).tolist() == [len(text.encode()), len(text)]
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.encode(text).tolist() == tokens.tolist()


def prepared_text(data: st.DataObject) -> None:
    """Prepared with another program's tokenizer, a text decodes byte for byte, in memory and by shards."""
    described, some = foreign(data)
    words = st.sampled_from([*some, " ", "\n", "To be", "caf\u00e9", "e\u0301", "\u754c", "AB"])
    texts = ["".join(data.draw(st.lists(words | ANY_TEXT, max_size=8))) for _ in range(2)]
    tokenizer_file, source = Path("foreign.json"), Path("foreign.txt")
    tokenizer_file.write_text(json.dumps(described), encoding="utf-8")
    source.write_bytes("".join(texts).encode())
    options = PrepareOptions(input_file=source, output_dir=Path("foreign"), tokenizer=str(tokenizer_file), force=True)
    with suppress(UserError):
        tokens = prepare(options)
        assert tokens is not None
        for part in ("train", "val"):
            written = (tokens.folder / f"{part}.txt").read_bytes()
            assert b"".join(tokens.tokenizer.token_bytes(int(token)) for token in getattr(tokens, part)) == written
        assert (tokens.folder / "train.txt").read_bytes() + (tokens.folder / "val.txt").read_bytes() == (
            "".join(texts).removeprefix("\ufeff").encode()
        )
    lines = Path("foreign.jsonl")
    lines.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    with suppress(UserError):
        tokenizer = read_tokenizer(tokenizer_file, documents=True)
        tokenize(Shard("jsonl", str(lines)), "text", tokenizer, Path("foreign-shard"))
        ids = np.fromfile("foreign-shard.tokens", dtype=tokenizer.dtype)
        found = np.split(ids, np.flatnonzero(ids == tokenizer.separator))[1:]
        decoded = [b"".join(tokenizer.token_bytes(int(token)) for token in part[1:]) for part in found]
        assert decoded == [text.encode() for text in texts if text.strip()]
