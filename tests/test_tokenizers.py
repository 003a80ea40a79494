"""Tokenizers: whatever the text, decoding what was encoded gives it back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.core.errors import UserError
from mmrec.tokenizers import (
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    token_lengths,
)

TEXT = "To be, or not to be: that is the question.\nd\u00e9j\u00e0 vu \U0001f600 \u4e16\u754c\r\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BPE = BPETokenizer.train(TEXT, 300)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_any_text_survives_bytes_and_bpe(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_any_text_survives_its_own_characters(text: str) -> None:
    tokenizer = CharacterTokenizer(text)
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT)
def test_a_streamed_text_is_the_same(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        decoder = StreamDecoder(tokenizer)
        assert "".join(decoder.push(int(t)) for t in tokenizer.encode(text)) + decoder.flush() == text


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_lengths_count_the_bytes_and_characters_of_the_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE, CharacterTokenizer(text)):
        size, characters = token_lengths(tokenizer)[tokenizer.encode(text)].sum(axis=0)
        assert (size, characters) == (len(text.encode()), len(text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stored_tokenizer_does_the_same(name: str) -> None:
    tokenizer = make_tokenizer(name, TEXT, "a validation text: z", 300 if name == "bpe" else None)
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.digest() == tokenizer.digest()
    assert again.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_characters_are_numbered_as_nanogpt_numbers_them() -> None:
    tokenizer = make_tokenizer("characters", "hello", "world", None)
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("dew").tolist() == [0, 1, 6]


def test_bpe_learns_from_the_training_part_alone() -> None:
    assert make_tokenizer("bpe", TEXT, "x" * 5000, 300).digest() == make_tokenizer("bpe", TEXT, "y", 300).digest()
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 2


LINES = TEXT.replace("\r", "")


@pytest.mark.parametrize("text", [TEXT, LINES.replace("\n", "\r\n"), " ".join(LINES.split()), "\r\n \n\n x" * 100])
def test_a_long_text_has_the_same_tokens_wherever_it_is_cut(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With line ends of either kind, and with none at all."""
    tokenizers = (BPE, CharacterTokenizer(text))
    whole = [tokenizer.encode(text) for tokenizer in tokenizers]
    for module in ("characters", "streaming"):
        monkeypatch.setattr(f"mmrec.tokenizers.{module}.PIECE", 100)
    for tokenizer, tokens in zip(tokenizers, whole, strict=True):
        np.testing.assert_array_equal(tokenizer.encode(text), tokens)
    with pytest.raises(UserError, match=r"'\u2026' \(in .{12,60}\u2026'\) is not"):
        tokenizers[1].encode(f"{text}\u2026")


def test_tokens_take_two_bytes_where_that_is_enough() -> None:
    assert ByteTokenizer().encode("abc").dtype == np.dtype("<u2")
    alphabet = "".join(chr(i) for i in range(0x10000, 0x20100))
    assert CharacterTokenizer(alphabet).encode(alphabet[-1]).dtype == np.dtype("<u4")


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [("bytes", 300, "for --tokenizer bpe"), ("bpe", 10, "too small")],
)
def test_a_wrong_request_is_refused(name: str, size: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_tokenizer(name, TEXT, TEXT, size)


@pytest.mark.parametrize("state", [{}, {"name": "words"}, {"name": "characters"}, {"name": "bpe", "model": "{"}])
def test_a_wrong_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_tokenizer(state)


def test_an_unknown_character_is_named() -> None:
    tokenizer: Tokenizer = CharacterTokenizer("abc")
    with pytest.raises(UserError, match="'\u00e9' \\(in 'a\u00e9'\\)"):
        tokenizer.encode("a\u00e9")
