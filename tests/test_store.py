"""The token folder: written whole or not at all, and checked when it is opened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure

from mmrec.core.errors import UserError
from mmrec.core.files import staged_folder
from mmrec.data.store import (
    NEEDED,
    HashedFile,
    TokenFolder,
    open_tokens,
    open_tokens_for,
    verify_tokens,
    write_tokens,
)
from mmrec.tokenizers import CharacterTokenizer

TEXTS = {"train": "abracadabra\n" * 20, "val": "cadabra\n" * 3}

SMALL = ("train.txt", "val.txt", *NEEDED)
"""The files of a small corpus."""


def write(folder: Path, texts: dict[str, str] = TEXTS) -> TokenFolder:
    return write_tokens(folder, texts, CharacterTokenizer("".join(texts.values())), {"corpus": {"name": "test"}})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tokens = write(tmp_path / "deep" / "tokens")
    for part, mapped in (("train", tokens.train), ("val", tokens.val)):
        assert isinstance(mapped, np.memmap)
        assert not mapped.flags.writeable
        assert tokens.tokenizer.decode(mapped) == TEXTS[part]
        assert (tokens.folder / f"{part}.txt").read_text() == TEXTS[part]
        assert tokens.manifest["tokens"][part] == len(TEXTS[part])
        assert (tokens.folder / f"{part}.bin").stat().st_size == 2 * len(TEXTS[part])
    verify_tokens(tokens.folder)


def test_manifest_describes_every_file(tmp_path: Path) -> None:
    tokens = write(tmp_path / "tokens")
    assert tokens.manifest["format"] == "mmrec-tokens"
    assert tokens.manifest["corpus"] == {"name": "test"}
    assert tokens.manifest["tokenizer"]["digest"] == tokens.tokenizer.digest()
    for name in SMALL:
        data = (tokens.folder / name).read_bytes()
        expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert tokens.manifest["files"][name] == expected


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5000)
    with HashedFile(tmp_path / "a") as file:
        file.write(data[:7])
        places = [file.reserve(1000), file.reserve(500)]
        file.put(places[1], data[1007:1507])
        file.put(places[0], data[7:1007])
        file.update(data[7:1507])
        file.write(data[1507:])
    assert (tmp_path / "a").read_bytes() == data
    assert file.fingerprint() == {"bytes": 5000, "sha256": hashlib.sha256(data).hexdigest()}


def test_writing_leaves_nothing_beside(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    write(tmp_path / "tokens", {"train": "other text", "val": "text"})
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert (tmp_path / "tokens" / "train.txt").read_text() == "other text"


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, earlier: bool
) -> None:
    folder = tmp_path / "tokens"
    if earlier:
        write(folder)
    before = snapshot(tmp_path)
    real: Callable[..., None] = getattr(os, call)
    calls = []

    def fail_once(*args: object) -> None:
        calls.append(args)
        # The second call: in the middle of the files, or between the two renames of a replacement.
        if len(calls) == (2 if earlier or call == "fsync" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr("mmrec.core.files.exchange_names", lambda *paths: False)  # as where folders cannot be swapped
    monkeypatch.setattr(os, call, fail_once)
    with pytest.raises(OSError, match="No space left") as caught:
        write(folder, {"train": "new text", "val": "text"})
    assert caught.value.errno == errno.ENOSPC
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["tokens"] if earlier else [])


def test_a_write_to_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    """The system's own failure, which carries no name."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def fill() -> None:
        with staged_folder(tmp_path / "tokens") as folder:
            (folder / "train.bin").symlink_to("/dev/full")
            with HashedFile(folder / "train.bin") as file:
                file.write(b"x" * 100_000)

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "tokens"))
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    written = write(tmp_path / "tokens")
    assert open_tokens_for(written.folder, written.tokenizer).manifest == written.manifest
    with pytest.raises(UserError, match="tokens: prepared with another tokenizer than the model was trained with"):
        open_tokens_for(written.folder, CharacterTokenizer("abcd"))


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mmrec prepare .* --output_dir"):
        open_tokens(tmp_path / "missing")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no prepared tokens"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "tokens").folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}: has .* instead of"):
        open_tokens(path.parent)


def test_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens").folder
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin: is missing"):
        open_tokens(folder)


@pytest.mark.reliability
def test_changed_bits_and_missing_ends_are_found(tmp_path: Path, figure: Figure) -> None:
    folder, tried = write(tmp_path / "tokens").folder, 0
    choose = random.Random(0)
    for name in (*SMALL, "manifest.json"):
        whole = (folder / name).read_bytes()
        for number in range(60):
            data = bytearray(whole)
            if number % 3:
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            else:
                del data[choose.randrange(len(data) - 1) :]
            (folder / name).write_bytes(data)
            with pytest.raises(UserError, match=re.escape(name) if name in SMALL else None):
                verify_tokens(folder)
            tried += 1
        (folder / name).write_bytes(whole)
    verify_tokens(folder)
    figure(
        "'mmrec prepare --verify' finds changed and cut files of tokens, and a manifest like that",
        f"{tried} of {tried}",
    )


def test_other_version(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens").folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_tokens(path.parent)


@pytest.mark.parametrize("key", ["files", "dtype"])
def test_damaged_manifest(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "tokens").folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        open_tokens(path.parent)
