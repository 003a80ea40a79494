"""The flat token store: a folder with tokens, the tokenizer, and a manifest of them all.

``train.bin`` and ``val.bin`` are tokens, little-endian uint16 or uint32, nothing else: random access is arithmetic,
and a memory map needs no memory. A small corpus has its text beside them, ``train.txt`` and ``val.txt``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrec.core.errors import UserError
from mmrec.core.file_system import write_at
from mmrec.core.files import staged_folder
from mmrec.data.provenance import SOURCES, Provenance
from mmrec.tokenizers import Tokenizer, load_tokenizer

FORMAT, VERSION = "mmrec-tokens", 2
MANIFEST = "manifest.json"
NEEDED = ("train.bin", "val.bin", "tokenizer.json")
FILES = ("train.txt", "val.txt", *NEEDED, "rejected.jsonl", SOURCES)
"""What a token folder may hold: also the texts of a small corpus, and what was set aside of a large one."""


@dataclass(frozen=True)
class TokenFolder:
    """An opened token folder.

    Attributes:
        folder: where it is.
        manifest: sizes, hashes, corpus, split.
        tokenizer: made the tokens.
        train: [N], memory-mapped, read-only.
        val: [M], memory-mapped, read-only.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray

    @property
    def digest(self) -> str:
        """What tells its tokens apart from others: a sha256 of those of both parts, in hexadecimal."""
        parts = (self.manifest["files"][f"{part}.bin"]["sha256"] for part in ("train", "val"))
        return hashlib.sha256("".join(parts).encode()).hexdigest()


class HashedFile:
    """A new file whose sha256 is taken while it is written: a large one is not read again for it.

    :meth:`write` appends. Threads that write side by side each :meth:`reserve` a place, :meth:`put` what belongs
    there, and :meth:`update` the hash when it is their turn: in the order of the places.

    Args:
        path: of the file; on disk once it is closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 -- closed by __exit__
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *failure: object) -> None:
        with self._file:
            if failure[0] is None:
                os.fsync(self._file.fileno())

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        self.put(self.reserve(len(data)), data)
        self.update(data)

    def reserve(self, size: int) -> int:
        """Return where the next ``size`` bytes of the file begin."""
        place, self._size = self._size, self._size + size
        return place

    def put(self, place: int, data: bytes | memoryview) -> None:
        """Write ``data`` at byte ``place``."""
        write_at(self._file, place, data)

    def update(self, data: bytes | memoryview) -> None:
        """Count ``data``, which follows what was counted before, into the hash."""
        self._hash.update(data)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a manifest says of the file, once it is closed."""
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


@contextmanager
def writing(
    folder: Path, tokenizer: Tokenizer, description: Mapping[str, Any]
) -> Iterator[Callable[[str], HashedFile]]:
    """Yield what makes the files of a token folder, by name; they get their place as by :func:`staged_folder`.

    Args:
        folder: the target; missing, empty, or a token folder that is to be replaced.
        tokenizer: of the tokens.
        description: what else the manifest says, at the end: the corpus and the split.
    """
    created: dict[str, HashedFile] = {}
    with staged_folder(folder) as staging:

        def create(name: str) -> HashedFile:
            created[name] = HashedFile(staging / name)
            return created[name]

        yield create
        with create("tokenizer.json") as file:
            file.write(json.dumps(tokenizer.state(), ensure_ascii=False).encode("utf-8"))
        files = {name: created[name].fingerprint() for name in FILES if name in created}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **description,
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "digest": tokenizer.digest(),
            },
            "dtype": tokenizer.dtype.str,
            "tokens": {part: files[f"{part}.bin"]["bytes"] // tokenizer.dtype.itemsize for part in ("train", "val")},
            "files": files,
        }
        manifest["sha256"] = manifest_digest(manifest)
        with create(MANIFEST) as file:
            file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def write_tokens(
    folder: Path,
    texts: Mapping[str, str],
    tokenizer: Tokenizer,
    description: Mapping[str, Any],
    sources: Provenance | None = None,
) -> TokenFolder:
    """Write the texts "train" and "val" and their tokens as a token folder, as :func:`writing` does.

    Args:
        folder: the target.
        texts: "train" and "val".
        tokenizer: of the tokens.
        description: what else the manifest says.
        sources: the files that were read and skipped.
    """
    with writing(folder, tokenizer, description) as create:
        if sources is not None:
            with create(SOURCES) as file:
                file.write(sources.encoded())
        for part, text in texts.items():
            with create(f"{part}.txt") as file:
                file.write(text.encode("utf-8"))
            with create(f"{part}.bin") as file:
                file.write(tokenizer.encode(text).tobytes())
    return open_tokens(folder)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what a manifest says, without that digest itself: of sorted JSON without white space."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a token folder, or None where ``folder`` is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest


def written_by_prepare(folder: Path) -> str:
    """Return why a folder among a person's texts is not read, or an empty string: it holds copies of such texts."""
    unfinished = folder.name.endswith(".work") and (folder / "plan.json").is_file()
    return "what mmrec prepare wrote" if unfinished or read_manifest(folder) is not None else ""


OTHER_TOKENS = "already holds another corpus, split or tokenizer"
CHOOSE_OR_FORCE = "choose another --output_dir, or replace it by --force"


class FolderTakenError(UserError):
    """What is to be prepared would take the place of something else.

    Args:
        folder: that holds it.
        what: there is, as the end of a sentence about the folder.
        instead: what can be done by the options of ``mmrec prepare``.
    """

    def __init__(self, folder: Path, what: str, instead: str) -> None:
        super().__init__(f"{folder}: {what}; {instead}")
        self.folder, self.what = folder, what


def open_tokens(folder: Path) -> TokenFolder:
    """Open a token folder.

    Raises:
        UserError: it is missing, not a token folder, of another version, or a file is not as long as it was.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it by 'mmrec prepare CORPUS --output_dir {folder}'")
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: holds no prepared tokens (no readable {MANIFEST}); make them by "
            f"'mmrec prepare CORPUS --output_dir FOLDER'"
        )
    dtype, sizes = describe_tokens(manifest, folder)
    for name, expected in sizes.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
            raise UserError(f"{folder / name}: {found}; prepare the corpus again (--force)")
    tokenizer = tokenizer_of(folder, dtype)
    train, val = (np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") for part in ("train", "val"))
    return TokenFolder(folder, manifest, tokenizer, train, val)


def open_tokens_for(folder: Path, tokenizer: Tokenizer) -> TokenFolder:
    """Open a token folder for a model of ``tokenizer``.

    Raises:
        UserError: as :func:`open_tokens`, and where another tokenizer made the tokens.
    """
    tokens = open_tokens(folder)
    if tokens.tokenizer.state() != tokenizer.state():
        raise UserError(f"{folder}: prepared with another tokenizer than the model was trained with")
    return tokens


def describe_tokens(manifest: dict[str, Any], folder: Path) -> tuple[np.dtype, dict[str, int]]:
    """Return the dtype of the tokens and the bytes of every file.

    Raises:
        UserError: the manifest is of another version, or damaged.
    """
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{folder}: token format version {manifest.get('version')}, this program reads {VERSION}; "
            f"prepare the corpus again"
        )
    return _described(manifest, folder)


def tokenizer_of(folder: Path, dtype: np.dtype) -> Tokenizer:
    """Return the tokenizer in ``folder``; UserError where it is damaged, or made no tokens of ``dtype``."""
    try:
        tokenizer = load_tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    except (ValueError, UserError):
        raise UserError(f"{folder / 'tokenizer.json'}: is damaged; prepare the corpus again (--force)") from None
    if tokenizer.dtype != dtype:
        raise UserError(f"{folder / 'tokenizer.json'}: did not make these tokens; prepare the corpus again (--force)")
    return tokenizer


def _described(manifest: dict[str, Any], folder: Path) -> tuple[np.dtype, dict[str, int]]:
    """Return the dtype of the tokens and the bytes of every file; UserError where the manifest does not say them."""
    match manifest:
        case {"dtype": "<u2" | "<u4" as name, "files": dict(files), "corpus": {"name": str()}}:
            dtype = np.dtype(name)
            known = {file: entry.get("bytes") for file, entry in files.items() if isinstance(entry, dict)}
            sizes = {file: size for file in FILES if isinstance(size := known.get(file), int)}
            tokens = [sizes.get(file, 0) for file in ("train.bin", "val.bin")]
            whole = (
                len(sizes) == len(files)
                and set(NEEDED) <= set(sizes)
                and all(size > 0 == size % dtype.itemsize for size in tokens)
            )
            if whole and manifest.get("sha256") == manifest_digest(manifest):
                return dtype, sizes
    raise UserError(f"{folder / MANIFEST}: is damaged; prepare the corpus again (--force)")


def verify_tokens(folder: Path) -> TokenFolder:
    """Open a token folder, and compare the hash of every file; UserError names the first that differs."""
    tokens = open_tokens(folder)
    for name, written in tokens.manifest["files"].items():
        if _fingerprint(folder / name) != written:
            raise UserError(f"{folder / name}: its content has changed (wrong sha256); prepare the corpus again")
    return tokens
