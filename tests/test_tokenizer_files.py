"""Tokenizers that are there already: the same tokens again, and nothing that tokens would not be exact of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, make_text
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from mmrec.core.errors import UserError
from mmrec.data.store import open_tokens
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
    tokenizer = write_foreign(path)
    assert read_tokenizer(path).decode(read_tokenizer(path).encode(PROBE)) == PROBE
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(tmp_path / "normal.json"))
    write_foreign(tmp_path / "space.json", prefix_space=True)
    words = HFTokenizer(models.WordLevel({"a": 0, "\u0130": 1}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "named.json").write_text('{"name": "words"}')
    for name, says in (
        ("normal.json", "changes the text"),
        ("space.json", "changes the text"),
        ("words.json", "is not byte-level BPE|changes the text"),
        ("other.json", "not a readable HF tokenizers file"),
        ("list.json", "not a readable HF tokenizers file"),
        ("bad.json", "holds no tokenizer"),
        ("bad.safetensors", "holds no tokenizer"),
        ("named.json", "not a tokenizer of this program"),
        ("nowhere", "no such tokenizer file"),
        (".", "tokenizer file|changes"),
    ):
        if name == ".":
            path.unlink()
        with pytest.raises(UserError, match=says) as error:
            read_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
