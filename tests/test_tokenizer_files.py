"""Tokenizers that are there already: the same tokens again, and nothing that tokens would not be exact of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, make_text
from foreign_tokenizers import WORDS, added, byte_level, sentencepiece
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers

from mmrec.core.errors import UserError
from mmrec.data.store import open_tokens
from mmrec.tokenizers import Tokenizer, load_tokenizer
from mmrec.tokenizers.loading import PROBE, read_tokenizer


def write_foreign(path: Path, prefix_space: bool = False) -> HFTokenizer:
    """A byte-level BPE in GPT-2's form, with a special token that it puts before each text."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([make_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(path))
    return tokenizer


def test_tokens_are_those_of_the_other_program(tmp_path: Path, mmrec: Command) -> None:
    foreign = write_foreign(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text(make_text())
    assert mmrec("prepare", "--input_file=text.txt", "--output_dir=out", "--tokenizer=tokenizer.json") == 0
    tokens = open_tokens(tmp_path / "out")
    for part in (tokens.train, tokens.val):
        text = tokens.tokenizer.decode(part)
        np.testing.assert_array_equal(part, foreign.encode(text, add_special_tokens=False).ids)
    assert tokens.tokenizer.vocab_size == 300


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_the_tokenizer_of_another_folder(
    tmp_path: Path, mmrec: Command, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text(make_text())
    (tmp_path / "two.txt").write_text("to be, that is the question\n".replace(",", " not") * 50)
    size = ["--vocab_size=300"] if kind == "bpe" else []
    assert mmrec("prepare", "--input_file=one.txt", "--output_dir=one", f"--tokenizer={kind}", *size) == 0
    second = ["prepare", "--input_file=two.txt", "--output_dir=two"]
    assert mmrec(*second, "--tokenizer=one") == 0
    assert open_tokens(Path("two")).tokenizer.state() == open_tokens(Path("one")).tokenizer.state()
    capsys.readouterr()
    assert mmrec(*second, "--tokenizer=one/tokenizer.json") == 0
    assert "already prepared" in capsys.readouterr().out
    assert mmrec(*second, "--tokenizer=bytes") == (0 if kind == "nothing" else 2)
    assert "already holds another corpus, split or tokenizer" in capsys.readouterr().err
    assert mmrec(*second, "--tokenizer=one", "--vocab_size=300") == 2
    assert "--vocab_size is for --tokenizer bpe" in capsys.readouterr().err


def test_large_corpora_have_documents(tmp_path: Path, mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datatrove")
    write_foreign(tmp_path / "tokenizer.json")
    (tmp_path / "mine").mkdir()
    lines = [json.dumps({"text": f"{n}: {make_text()[n * 50 : n * 50 + 400]}"}) for n in range(60)]
    (tmp_path / "mine" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text(make_text())
    large = ["prepare", "mine", "--workers=1"]
    assert mmrec(*large, "--output_dir=out", "--tokenizer=tokenizer.json") == 0
    tokens = open_tokens(Path("out"))
    assert tokens.tokenizer.separator == 300
    assert (tokens.train == 300).sum() + (tokens.val == 300).sum() == 60
    assert mmrec(*large, "--output_dir=again", "--tokenizer=out") == 0
    np.testing.assert_array_equal(open_tokens(Path("again")).train, tokens.train)
    assert mmrec("prepare", "--input_file=text.txt", "--output_dir=small", "--tokenizer=bytes") == 0
    capsys.readouterr()
    assert mmrec(*large, "--output_dir=third", "--tokenizer=small") == 2
    assert "has no token that begins a document" in capsys.readouterr().err
    assert not Path("third").exists()


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    write_foreign(path)
    assert read_tokenizer(path).decode(read_tokenizer(path).encode(PROBE)) == PROBE
    write_foreign(tmp_path / "space.json", prefix_space=True)
    words = HFTokenizer(models.WordLevel({"a": 0, "\u0130": 1}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "named.json").write_text('{"name": "words"}')
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    for name, says in (
        ("space.json", "changes the text: from character 1 on, .* a space before the text"),
        ("words.json", "is not byte-level BPE but WordLevel"),
        ("other.json", "not a readable HF tokenizers file"),
        ("list.json", "not a readable HF tokenizers file"),
        ("bad.json", "holds no tokenizer"),
        ("bad.safetensors", "holds no tokenizer"),
        ("named.json", "not a tokenizer of this program"),
        ("spiece.model", "a SentencePiece model; convert it first: .*save_pretrained"),
        ("vocab.txt", "a WordPiece vocabulary; convert it first"),
        ("nowhere", "no such tokenizer file"),
        (".", "no such tokenizer file"),
    ):
        if name == ".":
            path.unlink()
        with pytest.raises(UserError, match=says) as error:
            read_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)


def read(described: dict[str, Any], path: Path) -> Tokenizer:
    path.write_text(json.dumps(described), encoding="utf-8")
    return read_tokenizer(path)


TRUNCATED = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}
PADDED: dict[str, Any] = {
    "padding": {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
}
SENTENCE = "  the caf\u00e9 was <mask>  <end\u2581of\uff5ctext> 世界 e\u0301t\u00e9\u00e9\n    \u05e9 \U0001f600"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        TRUNCATED,
        PADDED,
        {"added_tokens": [added(300, "caf\u00e9"), added(301, "\u00e9t\u00e9", normalized=True)]},
        {"added_tokens": [added(300, "<mask>", lstrip=True, rstrip=True, special=True)]},
        {"added_tokens": [added(300, "  "), added(301, "    ")]},
        {"added_tokens": [added(300, "<end\u2581of\uff5ctext>", special=True)]},
        {"added_tokens": [added(0, "\u00e9"), added(300, "t\u00e9", single_word=True)]},
    ],
)
def test_byte_level_bpe_gives_every_byte_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = read(byte_level() | changes, tmp_path / "tokenizer.json")
    tokens = tokenizer.encode(SENTENCE)
    assert tokenizer.decode(tokens) == SENTENCE
    np.testing.assert_array_equal(load_tokenizer(tokenizer.state()).encode(SENTENCE), tokens)
    used = [change["content"] for change in changes.get("added_tokens", []) if change["content"] != "\u00e9"]
    spelled = {tokenizer.token_bytes(int(token)).decode(errors="replace") for token in tokens}
    assert {content for content in used if content in SENTENCE and content != "t\u00e9"} - {"  "} <= spelled


def test_a_tokenizer_with_dropout_cuts_the_same_way_each_time(tmp_path: Path) -> None:
    plain, random = byte_level(), byte_level()
    random["model"]["dropout"] = 0.5
    expected = read(plain, tmp_path / "plain.json").encode(WORDS)
    np.testing.assert_array_equal(read(random, tmp_path / "random.json").encode(WORDS), expected)


def test_a_tokenizer_that_lacks_bytes_is_refused(tmp_path: Path) -> None:
    described = byte_level(alphabet=False)
    with pytest.raises(
        UserError, match=r"no token for \d+ of the 256 bytes \(0x00, 0x01, 0x02\): text would be lost"
    ):
        read(described, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "Lowercase"])
def test_a_normalizer_is_refused_at_the_place_where_it_changes_the_text(tmp_path: Path, normalizer: str) -> None:
    tokenizer = read(byte_level() | {"normalizer": {"type": normalizer}}, tmp_path / "tokenizer.json")
    kept = "plain text\n" * 3
    assert tokenizer.decode(tokenizer.encode(kept)) == kept
    with pytest.raises(UserError, match=rf"from character 34 on, .*\(it has {normalizer}; without"):
        tokenizer.encode(kept + ("E\u0301" if normalizer != "NFKC" else "\ufb01"))


def test_sentencepiece_with_byte_fallback_is_read(tmp_path: Path) -> None:
    tokenizer = read(sentencepiece(), tmp_path / "tokenizer.json")
    text = "To be\u754c\u4e16  or\n not\U0001f4a9"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match=r"from character 3 on, 'to\u2581be' comes back as 'to be'"):
        tokenizer.encode("to\u2581be")


@pytest.mark.parametrize(
    ("described", "says"),
    [
        (sentencepiece(prepend=True), "begins? .*|changes the text: from character 1 on, .*Prepend"),
        (sentencepiece(fallback=False), "without bytes, which loses text; .*--tokenizer bpe --vocab_size"),
        (
            {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}},
            "but WordPiece, which loses text; it cannot be converted: learn one",
        ),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}, r"SentencePiece \(Uni"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path: Path, described: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(described, tmp_path / "tokenizer.json")


def test_what_loses_text_is_not_prepared(tmp_path: Path, mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """In either path, and with the place."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level() | {"normalizer": {"type": "NFC"}}))
    (tmp_path / "text.txt").write_text("a plain text\n" * 9 + "cafe\u0301\n")
    assert mmrec("prepare", "text.txt", "--tokenizer=tokenizer.json", "--output_dir=out", "--val_split=0.1") == 2
    assert "the tokenizer changes the text: from character " in capsys.readouterr().err
    pytest.importorskip("datatrove")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "plain"}) + "\n" + json.dumps({"text": "cafe\u0301"}))
    assert mmrec("prepare", "a.jsonl", "--tokenizer=tokenizer.json", "--output_dir=out", "--workers=1") == 2
    assert "a.jsonl: record 2: the tokenizer changes the text: from character 4 on" in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_loses_text_is_not_read_by_a_model_either(
    tmp_path: Path, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on text that its tokenizer keeps, a model refuses a text that it would change."""
    from helpers import fit

    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level() | {"normalizer": {"type": "NFC"}} | TRUNCATED))
    (tmp_path / "text.txt").write_text(make_text())
    (tmp_path / "other.txt").write_text("a caf\u0065\u0301")
    assert mmrec("prepare", "text.txt", "--tokenizer=tokenizer.json", "--output_dir=out") == 0
    assert len(open_tokens(Path("out")).train) > 100
    assert mmrec(*fit(Path("out"), "--trainer.max_steps=1", "--run=r")) == 0
    assert mmrec("score", "text.txt", "--run=r", "--ckpt=last") == 0
    capsys.readouterr()
    for command in (["score", "other.txt"], ["read", "other.txt", "--save=m"], ["generate", "--prompt=e\u0301"]):
        assert mmrec(*command, "--run=r", "--ckpt=last") == 2
        assert "the tokenizer changes the text: from character" in capsys.readouterr().err
