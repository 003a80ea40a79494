"""The split of a large corpus: by hash where that meets the share, by size where it does not, copies together."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, make_text
from layouts import split_at_separator, texts, write_json_lines

from mmrec.data.store import TokenFolder, open_tokens
from mmrec.tokenizers import BPETokenizer

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def sides(tokens: TokenFolder) -> tuple[list[str], list[str]]:
    return split_at_separator(tokens, "train"), split_at_separator(tokens, "val")


def write_files(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("share", ["0.05", "0.5"])
def test_copies_are_never_on_both_sides(mmrec: Command, tmp_path: Path, share: str) -> None:
    parts = {f"{n}.txt": f"chapter {n}\n" + make_text()[n * 400 : (n + 1) * 400] for n in range(4)}
    write_files(tmp_path / "mine", parts | {"0 (copy).txt": parts["0.txt"], "1 (copy).txt": parts["1.txt"]})
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1", "--val_split", share) == 0
    train, val = sides(open_tokens(Path("out")))
    assert train
    assert val
    assert not set(train) & set(val)
    assert {text for text in parts.values() if text not in train + val} <= {max(parts.values(), key=len)}


@pytest.mark.parametrize("tokenizer", [["bytes"], ["bpe", "--vocab_size", "300"]])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_distinct_text_is_split_by_its_last_part(
    mmrec: Command, tmp_path: Path, copies: int, tokenizer: list[str]
) -> None:
    """As a file, as a compressed one, in a folder, as the only record, and more than once."""
    text = "".join(f"{n} \u4e16\u754c d\u00e9j\u00e0 vu\n" for n in range(300))
    write_files(tmp_path / "mine", {f"{n}.txt": text for n in range(copies)})
    packed = [f"novel{n}.txt.gz" for n in range(copies)]
    for name in packed:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    write_json_lines(tmp_path / "a.jsonl", [text] * copies)
    for number, sources in enumerate((["mine"], ["a.jsonl"], packed)):
        out = f"out{number}"
        command = ["prepare", *sources, "--output_dir", out]
        assert mmrec(*command, "--workers", "1", "--val_split", "0.2", "--tokenizer", *tokenizer) == 0
        tokens = open_tokens(Path(out))
        (train,), (val,) = sides(tokens)
        assert train + val == text
        assert 0.15 < len(val) / len(text) < 0.25
        assert tokens.manifest["split"]["rule"] == "the last part of the text"
        assert tokens.manifest["documents"]["duplicates"]["documents"] == copies - 1
        size = sum(tokens.manifest["documents"][part]["bytes"] for part in ("train", "val"))
        assert size == len(text.encode())


def test_the_share_is_by_size(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few documents, one much larger than the others: these validate, and its last part fills the share."""
    novel, small = make_text() * 12, {f"{n}.txt": f"a small one, {n}\n" * 20 for n in range(3)}
    write_files(tmp_path / "mine", {"novel.txt": novel} | small)
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1") == 0
    tokens = open_tokens(Path("out"))
    train, val = sides(tokens)
    assert sorted(val[:-1]) == sorted(small.values())
    assert train[0] + val[-1] == novel
    assert tokens.manifest["split"]["val_share"] == pytest.approx(0.05, abs=0.002)
    assert "validation  5.0" in capsys.readouterr().out


def test_few_documents_of_a_size_meet_the_share(mmrec: Command, tmp_path: Path) -> None:
    for count in (2, 3, 5, 10, 40):
        parts = [f"{n} " + make_text()[n * 90 : n * 90 + 300] for n in range(count)]
        write_json_lines(tmp_path / f"{count}.jsonl", parts)
        out = f"out{count}"
        assert mmrec("prepare", f"{count}.jsonl", "--output_dir", out, "--workers", "1", "--val_split", "0.1") == 0
        tokens = open_tokens(Path(out))
        assert 0.05 <= tokens.manifest["split"]["val_share"] <= 0.2, count
        assert sum(map(len, map("".join, sides(tokens)))) == sum(map(len, parts))


def test_the_same_split_for_any_number_of_workers_and_order_of_files(mmrec: Command, tmp_path: Path) -> None:
    parts = texts(9)
    for name, order in (("a", parts), ("b", parts[::-1])):
        write_json_lines(tmp_path / f"{name}.jsonl", order)
        assert mmrec("prepare", f"{name}.jsonl", "--output_dir", name, "--workers", "1", "--val_split", "0.3") == 0
    assert {*sides(open_tokens(Path("a")))[1]} == {*sides(open_tokens(Path("b")))[1]}


def test_nothing_to_split_is_said(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    assert mmrec("prepare", "a.jsonl", "--output_dir", "out", "--workers", "1") == 2
    assert "too little text to split" in capsys.readouterr().err


WORDS = [f"{chr(97 + n)}{chr(110 + n)}" * 3 for n in range(9)]
"""Words of nine documents that have no pair of letters in common."""


def learned_tokens(folder: str) -> set[str]:
    tokenizer = open_tokens(Path(folder)).tokenizer
    return {tokenizer.token_bytes(token).decode("latin-1") for token in range(tokenizer.vocab_size)}


def test_bpe_is_learned_from_what_trains_alone(
    mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the split is by size, which is known once all was read; also where the work was stopped in between."""
    command = ["prepare", "mine.jsonl", "--workers", "1", "--tokenizer", "bpe", "--vocab_size", "400"]
    write_json_lines(tmp_path / "mine.jsonl", [f"{word} " * (44 + n) for n, word in enumerate(WORDS)])
    assert mmrec(*command, "--output_dir", "whole", "--val_split", "0.3") == 0
    tokens = open_tokens(Path("whole"))
    assert "by size" in tokens.manifest["split"]["rule"]
    train, val = sides(tokens)
    val_words = {text.split()[0] for text in val} - {text.split()[0] for text in train}
    train_words = {text.split()[0] for text in train}
    assert val_words
    tokens_learned = learned_tokens("whole")
    assert not {word[:2] for word in val_words} & tokens_learned
    assert {word[:2] for word in train_words} <= tokens_learned
    assert "BPE is learned again" in capsys.readouterr().out

    saved, calls = BPETokenizer.train, iter([False, True])

    def stopped(*args: Any, **kwargs: Any) -> BPETokenizer:
        if next(calls):
            raise KeyboardInterrupt
        return saved(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BPETokenizer, "train", stopped)
        assert mmrec(*command, "--output_dir", "parts", "--val_split", "0.3") == 130
    assert Path("parts.work/held_out.json").exists()
    assert mmrec(*command, "--output_dir", "parts", "--val_split", "0.3") == 0
    for name in ("tokenizer.json", "train.bin", "val.bin"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()


def test_bpe_is_not_learned_from_the_end_of_a_text_that_validates(mmrec: Command, tmp_path: Path) -> None:
    for number in range(4):  # of these texts some would validate as a whole, by their hash
        (tmp_path / f"{number}.txt").write_text(f"{number} " + "an an an " * 3000 + "bo bo bo " * 3000)
        command = ["prepare", f"{number}.txt.gz", "--workers", "1", "--tokenizer", "bpe", "--vocab_size", "400"]
        data = (tmp_path / f"{number}.txt").read_bytes()
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(data))
        assert mmrec(*command, "--output_dir", f"out{number}", "--val_split", "0.5") == 0
        (train,), (val,) = sides(open_tokens(Path(f"out{number}")))
        assert train.encode() + val.encode() == data
        found = learned_tokens(f"out{number}")
        assert "an" in {token.strip("\u0120 ") for token in found}
        assert "bo" not in {token.strip("\u0120 ") for token in found}
