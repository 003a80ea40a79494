"""Files to fuzz, our own and those of large corpora, damaged or saying anything. All stand in the current folder."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import altered, damaged
from hypothesis import strategies as st
from layouts import WIKI, page, record_of, tar_of, write_parquet
from models import SHORT_AND_LONG, content

from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.checkpoints.checksummed import _digest as digest_of
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.state_file import SavedState, load_memory, save_memory
from mmrec.core.errors import UserError
from mmrec.data.pipeline.formats import reader_of
from mmrec.data.pipeline.records import Rejected
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.tokenize_shard import documents as documents_of
from mmrec.data.store import MANIFEST, NEEDED, manifest_digest, open_tokens, verify_tokens, write_tokens
from mmrec.model import RecurrentLM
from mmrec.tokenizers import CharacterTokenizer

zstd = pytest.importorskip("backports.zstd")
SMALL = ("train.txt", "val.txt", *NEEDED)


@cache
def token_folder() -> tuple[Path, dict[str, bytes]]:
    folder = Path("tokens")
    texts = {"train": "abracadabra\n" * 4, "val": "cadabra\n"}
    write_tokens(folder, texts, CharacterTokenizer("".join(texts.values())), {"corpus": {"name": "test"}})
    return folder, {name: (folder / name).read_bytes() for name in (*SMALL, MANIFEST)}


def opened(folder: Path) -> None:
    tokens = open_tokens(folder)
    for part in (tokens.train, tokens.val):
        tokens.tokenizer.decode(part[:1])


def damaged_tokens(data: st.DataObject) -> None:
    """A damaged file of tokens is found, and so is a damaged manifest."""
    folder, files = token_folder()
    name = data.draw(st.sampled_from([*SMALL, MANIFEST]))
    harmed = damaged(files[name], data)
    (folder / name).write_bytes(harmed)
    try:
        verify_tokens(folder)
        assert harmed == files[name] or (name == MANIFEST and json.loads(harmed) == json.loads(files[name]))
    except UserError:
        assert harmed != files[name]
    finally:
        (folder / name).write_bytes(files[name])


def manifest(data: st.DataObject) -> None:
    """A manifest may say anything, with a digest that fits it."""
    folder, files = token_folder()
    said = altered(json.loads(files[MANIFEST]), data)
    if isinstance(said, dict):
        said["sha256"] = manifest_digest(said)
    (folder / MANIFEST).write_text(json.dumps(said))
    try:
        opened(folder)
        verify_tokens(folder)
    except UserError:
        pass
    finally:
        (folder / MANIFEST).write_bytes(files[MANIFEST])


@cache
def checkpoint() -> tuple[bytes, bytes]:
    """The bytes of a checkpoint of ours, and of the same without a checksum."""
    torch.manual_seed(0)
    written = content(RecurrentLM(SHORT_AND_LONG, 3))
    write_checkpoint(written, Path("a.ckpt"))
    torch.save(written, Path("b.ckpt"))
    return Path("a.ckpt").read_bytes(), Path("b.ckpt").read_bytes()


def damaged_checkpoint(data: st.DataObject) -> None:
    """A changed checkpoint is refused by its checksum; one without a checksum is refused or read."""
    checksummed = data.draw(st.booleans())
    whole = checkpoint()[0 if checksummed else 1]
    harmed = damaged(whole, data)
    path = Path("damaged.ckpt")
    path.write_bytes(harmed)
    try:
        load_model(path)
        assert not checksummed or harmed == whole
    except UserError:
        assert harmed != whole


def other_checkpoint(data: st.DataObject) -> None:
    """A checkpoint may hold anything that can be saved."""
    path = Path("other.ckpt")
    written = torch.load(io.BytesIO(checkpoint()[1]), weights_only=True)
    weights = written.pop("state_dict")
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(weights)))
        weights[name] = data.draw(st.sampled_from([None, 1, "a", torch.zeros(()), torch.zeros(3, 3), torch.zeros(0)]))
    written = altered({**written, "state_dict": {}}, data)
    if isinstance(written, dict) and written.get("state_dict") == {}:
        written["state_dict"] = weights
    write_checkpoint(written, path)
    with suppress(UserError):
        load_model(path)


@cache
def memory() -> tuple[RecurrentLM, bytes]:
    torch.manual_seed(0)
    net = RecurrentLM(SHORT_AND_LONG, 3).eval()
    save_memory(Path("a.mem"), SavedState.empty(net).learning(net), "hash")
    return net, Path("a.mem").read_bytes()


def memory_file(data: st.DataObject) -> None:
    """A memory that is not as it was saved is refused, and so is one of other tensors with a digest that fits."""
    net, whole = memory()
    harmed, path = damaged(whole, data), Path("b.mem")
    if data.draw(st.booleans()):
        tensors: dict[str, Any] = safetensors.torch.load(whole)
        name = data.draw(st.sampled_from(sorted(tensors)))
        other = [torch.zeros(3), torch.zeros(()), torch.zeros_like(tensors[name], dtype=torch.int32), None]
        tensors[data.draw(st.sampled_from([name, "more"]))] = data.draw(st.sampled_from(other))
        tensors = {key: value for key, value in tensors.items() if value is not None}
        said = {"format": "mmrec-memory", "version": data.draw(st.sampled_from("12")), "model": "hash"}
        said |= {"learned": data.draw(st.sampled_from(["full", "small", "", "x"]))}
        said |= {"learned_updates": data.draw(st.sampled_from(["3", "", "-1", "x"]))}
        said |= {"position": data.draw(st.sampled_from(["0", "", "-1", "x", "9" * 5000]))}
        said.pop(data.draw(st.sampled_from([*said, ""])), None)
        tensors |= data.draw(st.sampled_from([{}, {"half": torch.zeros(1, dtype=torch.bfloat16)}]))
        digest = digest_of(tensors, said) if "half" not in tensors else "0"  # which NumPy does not know
        harmed = safetensors.torch.save(tensors, said | {"sha256": digest})
    path.write_bytes(harmed)
    try:
        load_memory(path, net, "hash")
        assert harmed == whole or set(safetensors.torch.load(harmed)) == set(safetensors.torch.load(whole))
    except UserError:
        assert harmed != whole


@cache
def large_files() -> dict[str, bytes]:
    """A small file of every format of large corpora, by its name."""
    lines = b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in ("one", "tw\u00f6", "three"))
    pages = (WIKI + page("T", "'''a''' [[b|c]] {{d}}") * 2 + "</mediawiki>").encode()
    inner = tar_of({"a.txt": b"one", "b.txt": b"two"})
    write_parquet(Path("a.parquet"), ["one", None, "two", "two"])
    files = {"a.jsonl": lines, "a.txt": lines, "a.xml": pages, "a.tar": tar_of({"a.txt": b"one"}, "w")}
    files |= {"a.tfrecord": record_of("one") + record_of(None), "openwebtext.tar": tar_of({"1_data.xz": inner}, "w")}
    files["a.parquet"] = Path("a.parquet").read_bytes()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
    packed = {f"{name}.{end}": pack[end](files[name]) for end in pack for name in ("a.jsonl", "a.tar", "a.xml")}
    return files | packed


def large_file(data: st.DataObject) -> None:
    """A file of a large corpus gives its texts, sets records aside, or is refused in one line."""
    name = data.draw(st.sampled_from(sorted(large_files())))
    path = Path(f"damaged-{name}") if not name.startswith("openwebtext") else Path(name)
    path.write_bytes(damaged(large_files()[name], data))
    try:
        records = list(documents_of(Shard(str(reader_of(name)), str(path)), "text"))
    except UserError as error:
        said = str(error)
        assert path.name in said
        return
    for record in records:
        assert isinstance(record, Rejected) or record.encode("utf-8").strip()
