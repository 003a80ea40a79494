"""Preparing a corpus: the split, the files, and that nothing is ever overwritten silently."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHAKESPEARE, Command
from helpers import fit

from mmrec.core.errors import UserError
from mmrec.data.corpora.base import Document
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare
from mmrec.data.split import default_split, split_documents
from mmrec.data.store import MANIFEST, open_tokens, verify_tokens


@pytest.fixture
def source(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "source.txt"
    path.write_text(text)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_text_is_split_before_its_last_part(source: Path, tmp_path: Path, text: str) -> None:
    folder = prepare(PrepareOptions(input_file=source, output_dir=tmp_path / "out", val_split=0.25))
    assert folder is not None
    cut = int(len(text) * 0.75)
    assert (tmp_path / "out" / "train.txt").read_text() == text[:cut]
    assert (tmp_path / "out" / "val.txt").read_text() == text[cut:]
    assert folder.tokenizer.name == "bytes"
    np.testing.assert_array_equal(folder.train, folder.tokenizer.encode(text[:cut]))
    np.testing.assert_array_equal(folder.val, folder.tokenizer.encode(text[cut:]))


def test_the_manifest_says_sizes_hashes_tokenizer_and_split(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(PrepareOptions(input_file=source, output_dir=out, tokenizer="bpe", vocab_size=300))
    manifest = json.loads((out / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["tokenizer"]["name"] == "bpe"
    assert manifest["split"]["val_split"] == 0.2
    assert manifest["tokens"]["val"] == len(open_tokens(out).val)


@pytest.mark.parametrize(
    ("size", "share"), [(10, 0.2), (999_999, 0.2), (10**6, 0.1), (10**9 - 1, 0.1), (10**9, 0.05)]
)
def test_the_default_split_goes_by_size(size: int, share: float) -> None:
    assert default_split(size)[0] == share


def documents(*sizes: int) -> list[Document]:
    return [Document(f"{i}", chr(97 + i % 26) * size + f" {i}") for i, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [(50,) * 20, (1000, 100, 100, 100), tuple(range(3, 40))])
def test_whole_documents_are_on_one_side(sizes: tuple[int, ...]) -> None:
    train, val, split = split_documents(given := documents(*sizes), 0.2)
    parts = {text: (text in train.split("\n\n"), text in val.split("\n\n")) for text in (d.text for d in given)}
    assert all(in_train != in_val for in_train, in_val in parts.values())
    assert {in_val for _, in_val in parts.values()} == {True, False}
    assert split["documents"]["train"] + split["documents"]["val"] == len(given)


@pytest.mark.parametrize("sizes", [(50, 50), (1000, 10), (30_000, 29_000), (10_000, 10, 10, 10), (500, 501)])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_document_larger_than_the_share_is_cut(sizes: tuple[int, ...], share: float) -> None:
    """Whole documents that fit validate; what is missing of the share is the last part of the largest."""
    given = documents(*sizes)
    train, val, split = split_documents(given, share)
    largest = max(given, key=lambda document: len(document.text))
    assert split["rule"] == f"whole documents, and the last part of {largest.name}"
    assert split["val_share"] == pytest.approx(share, rel=0.15)
    assert len(train) + len(val) == len("\n\n".join(document.text for document in given))
    assert val.endswith(largest.text[-2:])


def test_of_the_copies_of_a_document_that_is_cut_one_is_kept() -> None:
    text = "abc " * 500
    given = [Document("a", text), Document("b", text), Document("c", "a short one")]
    train, val, split = split_documents(given, 0.1)
    assert (train + val).count("a short one") == 1
    assert len(train) + len(val) == len(text) + len("a short one") + len("\n\n")
    assert split["rule"].endswith("the last part of a")


def test_the_share_is_met_where_documents_are_small() -> None:
    _, _, split = split_documents(documents(*[50] * 200), 0.1)
    assert split["val_share"] == pytest.approx(0.1, abs=0.01)


def test_equal_documents_never_stand_on_both_sides() -> None:
    given = [Document(str(i), f"text {i % 7} " * 9) for i in range(70)]
    train, val, _ = split_documents(given, 0.3)
    assert not set(train.split("\n\n")) & set(val.split("\n\n"))


def test_copies_of_one_document_are_one_document() -> None:
    train, val, split = split_documents([Document("a", "x" * 80 + "y" * 20), Document("b", "x" * 80 + "y" * 20)], 0.2)
    assert (train, val) == ("x" * 80, "y" * 20)
    assert split["rule"] == "the last part of the text"


def test_the_order_of_the_files_does_not_decide(tmp_path: Path) -> None:
    given = documents(*[30] * 40)
    one, other = split_documents(given, 0.2)[1], split_documents(given[::-1], 0.2)[1]
    assert set(one.split("\n\n")) == set(other.split("\n\n"))


def test_a_folder_of_documents(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\n" * 10)
    out = tmp_path / "out"
    prepare(PrepareOptions(input_dir=tmp_path, output_dir=out))
    val = (out / "val.txt").read_text()
    assert json.loads((out / MANIFEST).read_text())["split"]["rule"] == "whole documents"
    assert 1 <= len({line for line in val.splitlines() if line}) < 12


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the real file is not at hand")
def test_tiny_shakespeare_is_split_as_everyone_does(tmp_path: Path) -> None:
    folder = prepare(PrepareOptions("tiny_shakespeare", output_dir=tmp_path / "out", mirror=str(SHAKESPEARE.parent)))
    assert folder is not None
    assert (len(folder.train), len(folder.val)) == (1_003_854, 111_540)
    assert folder.tokenizer.vocab_size == 65


# What is there already


def test_the_same_again_changes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prepare(PrepareOptions(input_file=source, output_dir=out))
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    prepare(PrepareOptions(input_file=source, output_dir=out))
    assert "already prepared" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_the_same_text_by_another_path_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    source.rename(folder / "a.txt")
    prepare(PrepareOptions(input_dir=folder, output_dir=tmp_path / "out"))
    monkeypatch.chdir(folder)
    prepare(PrepareOptions(input_dir=Path(), output_dir=tmp_path / "out"))
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"val_split": 0.3}, {"tokenizer": "characters"}])
def test_another_request_needs_force(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = tmp_path / "out"
    prepare(PrepareOptions(input_file=source, output_dir=out))
    before = snapshot(out)
    with pytest.raises(UserError, match="--force"):
        prepare(PrepareOptions(input_file=source, output_dir=out, **change))
    assert snapshot(out) == before
    prepare(PrepareOptions(input_file=source, output_dir=out, force=True, **change))
    assert snapshot(out) != before
    verify_tokens(out)


def test_a_changed_source_needs_force(source: Path, tmp_path: Path) -> None:
    prepare(PrepareOptions(input_file=source, output_dir=tmp_path / "out"))
    source.write_text(source.read_text() + "more")
    with pytest.raises(UserError, match="--force"):
        prepare(PrepareOptions(input_file=source, output_dir=tmp_path / "out"))


def test_a_small_folder_whose_tokens_have_changed_is_prepared_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PrepareOptions(input_file=source, output_dir=tmp_path / "out")
    prepare(options)
    file = tmp_path / "out" / "val.bin"
    before = file.read_bytes()
    file.write_bytes(b"zz" + before[2:])
    capsys.readouterr()
    prepare(options)
    assert file.read_bytes() == before
    assert "val.bin: its content has changed (wrong sha256); prepare the corpus again: this is done now" in (
        capsys.readouterr().out
    )
    verify_tokens(tmp_path / "out")
    prepare(options)
    assert "already prepared, nothing to do" in capsys.readouterr().out


def test_tokens_without_a_manifest_are_replaced_where_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    options = PrepareOptions(input_file=source, output_dir=tmp_path / "out")
    prepare(options)
    manifest = tmp_path / "out" / MANIFEST
    before = manifest.read_bytes()
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"holds tokens without a readable manifest\.json; .* replace it by --force"):
        prepare(options)
    prepare(dataclasses.replace(options, force=True))
    assert manifest.read_bytes() == before


def test_a_token_that_is_none_ends_a_training_in_one_line(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the processor would go on with what lies behind the embedding's memory."""
    for part in ("val", "train"):
        tokens = np.memmap(prepared / f"{part}.bin", dtype="<u2", mode="r+")
        tokens[: len(tokens) // 2] = 999
        tokens.flush()
        assert mmrec(*fit(prepared, "--trainer.max_steps=30", f"--run={part}")) == 2
        assert "holds token 999 where there are" in capsys.readouterr().err
        tokens[: len(tokens) // 2] = 0
        tokens.flush()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_something_else_is_never_touched(source: Path, tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds something else \(thesis\.txt\)"):
        prepare(PrepareOptions(input_file=source, output_dir=out, force=force))
    assert snapshot(out) == {"thesis.txt": b"years of work"}


def test_a_file_in_the_way(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        prepare(PrepareOptions(input_file=source, output_dir=source))
    with pytest.raises(UserError, match="cannot be written"):
        prepare(PrepareOptions(input_file=source, output_dir=source / "inside"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_all_as_it_was(
    mmrec: Command,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    command = ["prepare", "--input_file", source, "--output_dir", "out"]
    assert mmrec(*command) == 0
    before = snapshot(source.parent)
    capsys.readouterr()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmrec.core.files.exchange_names", lambda *paths: False)
        patch.setattr(os, broken, full)
        assert mmrec(*command, "--val_split=0.4", "--force") == 2
    assert capsys.readouterr().err == "mmrec: error: out: cannot be written: No space left on device\n"
    assert snapshot(source.parent) == before


# Bad requests


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "name a corpus"),
        ({"input_file": Path("a"), "input_dir": Path("b")}, "not both"),
        ({"corpus": "sample", "input_file": Path("a")}, "not for the corpus"),
        ({"corpus": "sample", "val_split": 0.0}, "between 0 and 1"),
        ({"corpus": "sample", "val_split": 1.0}, "between 0 and 1"),
        ({"corpus": "smaple"}, "did you mean 'sample'"),
        ({"corpus": "sample", "tokenizer": "byts"}, "did you mean 'bytes'"),
    ],
)
def test_a_bad_request_writes_nothing(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prepare(PrepareOptions(output_dir=tmp_path / "out", **options))
    assert not any(tmp_path.iterdir())


def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abcdefgh")
    with pytest.raises(UserError, match="too little text"):
        prepare(PrepareOptions(input_file=tmp_path / "short.txt", output_dir=tmp_path / "out", val_split=0.01))
    assert not (tmp_path / "out").exists()


# Opening


def test_damage_is_found(prepared: Path) -> None:
    verify_tokens(prepared)
    data = bytearray((prepared / "train.bin").read_bytes())
    data[100] ^= 1
    (prepared / "train.bin").write_bytes(data)
    open_tokens(prepared)  # the size is right: only reading all of it can tell
    with pytest.raises(UserError, match=r"train\.bin: its content has changed"):
        verify_tokens(prepared)
    (prepared / "train.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"train\.bin: has [\d,]+ bytes instead of"):
        open_tokens(prepared)
    (prepared / "val.bin").unlink()
    (prepared / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"val\.bin: is missing"):
        open_tokens(prepared)


def test_what_is_no_token_folder_is_refused(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match="mmrec prepare"):
        open_tokens(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no prepared tokens"):
        open_tokens(tmp_path)
    manifest = json.loads((prepared / MANIFEST).read_text())
    (prepared / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_tokens(prepared)


def test_a_text_file_may_stand_where_a_corpus_does(
    mmrec: Command, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.novel.txt").write_text(text)
    assert mmrec("prepare", "my.novel.txt") == 0
    assert open_tokens(Path("data/my.novel")).manifest["corpus"]["name"] == "file"
    assert mmrec("prepare", "my.novel.txt") == 0
    assert "already prepared" in capsys.readouterr().out
