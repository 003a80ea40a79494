"""Fuzzing: whatever is read is read right or refused in one line, and what holds for some input holds for any.

Each target runs on a few hundred inputs always and on thousands in the slow part. Inputs are drawn by hypothesis from
a fixed seed; one that fails is made small and printed.
"""

from __future__ import annotations

import bz2
import copy
import encodings.aliases
import gzip
import io
import json
import lzma
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import Figure
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from layouts import WIKI, page, record_of, tar_of, write_parquet
from test_checkpoint import SHAPE, content

from mmrec.checkpoint import load_trained, write_checkpoint
from mmrec.cli import main
from mmrec.corpora.base import Document
from mmrec.corpora.shakespeare_plays import speeches
from mmrec.errors import UserError
from mmrec.large.records import Rejected
from mmrec.large.shards import Shard
from mmrec.large.sources import reader_of
from mmrec.large.work import documents as documents_of
from mmrec.memory import Memory, load_memory, save_memory
from mmrec.model import MemoryLM
from mmrec.parsing import find_config, shipped_configs
from mmrec.prepare import SEPARATOR, split_documents
from mmrec.sealed import _digest as digest_of
from mmrec.stream import IGNORE, RowLoader, RowStream
from mmrec.text_files import check_encoding, decode_text
from mmrec.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    load_tokenizer,
    token_lengths,
)
from mmrec.tokens import MANIFEST, NEEDED, manifest_digest, open_tokens, verify_tokens, write_tokens

zstd = pytest.importorskip("backports.zstd")
SMALL = ("train.txt", "val.txt", *NEEDED)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ENCODINGS = sorted({*encodings.aliases.aliases.values(), "utf-8-sig", "idna", "punycode"})
KEYS = ["name", "model", "alphabet", "files", "bytes", "sha256", "dtype", "tokens", "version", "shape", "dim"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "/", "characters", "bytes", "bpe", "<u2", "<f8", "object", "V0", "S", *KEYS])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=8,
)
"""Anything that JSON or YAML can say."""


@cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train("To be, or not to be. D\u00e9j\u00e0 vu \U0001f600 \u4e16\u754c\r\n" * 20, 300)


def altered(value: Any, data: st.DataObject) -> Any:
    """Return a copy of ``value`` with one place in it removed, doubled or replaced."""
    value = copy.deepcopy(value)
    place, parent, key = value, None, None
    while isinstance(place, dict | list) and place and (parent is None or data.draw(st.integers(0, 3))):
        parent = place
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = place[key]
    if parent is None:
        return data.draw(VALUES)
    match data.draw(st.integers(0, 3)):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.append(place)
        case 2 if isinstance(place, int | str):
            more = data.draw(st.sampled_from([-1, 1, 1 << 40]))
            parent[key] = place * 2 if isinstance(place, str) else place + more
        case _:
            parent[key] = data.draw(VALUES)
    return value


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Return ``content`` with a few bytes changed, cut off, put in or moved."""
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(result)))
        match data.draw(st.integers(0, 4)):
            case 0:
                del result[place:]
            case 1:
                result[place:place] = data.draw(st.binary(min_size=1, max_size=8))
            case 2:
                del result[place : place + data.draw(st.integers(1, 64))]
            case 3:
                other = data.draw(st.integers(0, len(result)))
                result[place : place + 16] = result[other : other + 16]
            case _ if place < len(result):
                result[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(result)


FOLDER = Path()
"""For the whole file: one made for each input would take most of the time."""


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("fuzz")


def round_trip(data: st.DataObject) -> None:
    """Every tokenizer gives every text back, counts its bytes and characters, and survives being saved."""
    text = data.draw(ANY_TEXT)
    for tokenizer in (ByteTokenizer(), bpe(), *([CharacterTokenizer(text)] if text else [])):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        again = load_tokenizer(json.loads(json.dumps(tokenizer.state()))) if tokenizer is not bpe() else tokenizer
        np.testing.assert_array_equal(again.encode(text), tokens)
        lengths = token_lengths(tokenizer)[tokens].sum(axis=0) if tokenizer is not bpe() else None
        assert lengths is None or lengths.tolist() == [len(text.encode()), len(text)]


def streamed(data: st.DataObject) -> None:
    """Any tokens, also those that are no text, come out of the stream decoder as out of decode."""
    tokenizer = data.draw(st.sampled_from([ByteTokenizer(), bpe()]))
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == tokenizer.decode(tokens)


def tokenizer_state(data: st.DataObject) -> None:
    """What is no tokenizer is refused; what is one can be used."""
    match data.draw(st.integers(0, 3)):
        case 0:
            state = data.draw(VALUES)
        case 1:
            known = st.sampled_from([{"name": "characters", "alphabet": "abc"}, {"name": "bytes"}])
            state = altered(data.draw(known), data)
        case 2:
            state = {"name": "bpe", "model": json.dumps(altered(json.loads(bpe().state()["model"]), data))}
        case _:
            state = {"name": "bpe", "model": damaged(bpe().state()["model"].encode(), data).decode(errors="replace")}
    try:
        tokenizer = load_tokenizer(state)
    except UserError:
        return
    assert tokenizer.vocab_size >= 1
    tokenizer.decode([0, tokenizer.vocab_size - 1])
    try:
        tokens = tokenizer.encode("abc")
    except UserError:
        return
    assert all(token < tokenizer.vocab_size for token in tokens)


def every_token_once(data: st.DataObject) -> None:
    """Every token is predicted once an epoch: any batch, length, segment, number of processes, place of a resume."""
    world, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 40))
    total = data.draw(st.integers(max(length + 1, 2 * world * rows), 400))
    segment, seed = data.draw(st.integers(1, 500)), data.draw(st.integers(0, 2**40))
    # The processes that it began with, and those that it went on with: the rows are the same.
    cuts = [(1, world * rows), (world, rows), (world * rows, 1)]
    before, after = data.draw(st.sampled_from(cuts)), data.draw(st.sampled_from(cuts))

    def loaders(cut: tuple[int, int]) -> list[RowLoader]:
        tokens, (world, rows) = np.arange(total, dtype=np.uint16), cut
        streams = (RowStream(tokens, rows, length, seed, segment, 0.5, rank, world) for rank in range(world))
        return [RowLoader(stream) for stream in streams]

    first, second = loaders(before), loaders(after)
    place = data.draw(st.integers(0, 2 * len(first[0])))
    predicted: list[int] = []

    def take(loader: RowLoader, end: int) -> None:
        while loader.position < end:
            batch = next(iter(loader))
            scored = batch.targets != IGNORE
            assert ((batch.inputs[scored] + 1) % total == batch.targets[scored]).all()
            predicted.extend(batch.targets[scored].tolist())

    for loader in first:
        loader.position = place // len(loader) * len(loader)  # the start of the epoch
        take(loader, place)
    state = json.loads(json.dumps(first[0].state_dict()))
    for loader in second:
        loader.load_state_dict(state)
        take(loader, (place // len(loader) + 1) * len(loader))
    assert sorted(predicted) == list(range(total))


def text_file(data: st.DataObject) -> None:
    """The bytes of a file in any encoding are text that UTF-8 can hold, or refused."""
    encoding = data.draw(st.sampled_from(ENCODINGS))
    raw = data.draw(st.binary(max_size=40) | ANY_TEXT.map(str.encode))
    try:
        check_encoding(encoding)
        text = decode_text(raw, Path("text.txt"), encoding)
    except UserError:
        return
    assert text.encode("utf-8").strip()


def play(data: st.DataObject) -> None:
    """Speeches of any text are found in time, without marks of the file's own."""
    parts = st.sampled_from(["**", "*", "_", "[", "]", "\\", "#", "\n", "\n\n", "1\\.", "HAMLET", " ", "&amp;"])
    text = "".join(data.draw(st.lists(parts | ANY_TEXT, max_size=30)))
    assert "\n\n\n" not in speeches(text)


def documents(data: st.DataObject) -> None:
    """A split loses no document, cuts none of several, and never trains on what validates."""
    texts = data.draw(st.lists(ANY_TEXT.filter(bool), min_size=1, max_size=8))
    share = data.draw(st.floats(0.01, 0.99))
    train, val, _ = split_documents([Document(str(i), text) for i, text in enumerate(texts)], share)
    if len(set(texts)) == 1:
        assert train + val == texts[0]
    else:
        assert train
        assert val
        assert len(train) + len(val) + len(SEPARATOR) == len(SEPARATOR.join(texts))


@cache
def token_folder() -> tuple[Path, dict[str, bytes]]:
    folder = FOLDER / "tokens"
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
    """The bytes of a checkpoint of ours, and of the same without a seal."""
    torch.manual_seed(0)
    written = content(MemoryLM(SHAPE, 3))
    write_checkpoint(written, FOLDER / "a.ckpt")
    torch.save(written, FOLDER / "b.ckpt")
    return (FOLDER / "a.ckpt").read_bytes(), (FOLDER / "b.ckpt").read_bytes()


def damaged_checkpoint(data: st.DataObject) -> None:
    """A sealed checkpoint that is not as it was is refused; one without a seal is refused or read."""
    sealed = data.draw(st.booleans())
    whole = checkpoint()[0 if sealed else 1]
    harmed = damaged(whole, data)
    path = FOLDER / "damaged.ckpt"
    path.write_bytes(harmed)
    try:
        load_trained(path)
        assert not sealed or harmed == whole
    except UserError:
        assert harmed != whole


def other_checkpoint(data: st.DataObject) -> None:
    """A checkpoint may hold anything that can be saved."""
    path = FOLDER / "other.ckpt"
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
        load_trained(path)


@cache
def memory() -> tuple[MemoryLM, bytes]:
    torch.manual_seed(0)
    net = MemoryLM(SHAPE, 3).eval()
    save_memory(FOLDER / "a.mem", Memory.empty(net), "hash")
    return net, (FOLDER / "a.mem").read_bytes()


def memory_file(data: st.DataObject) -> None:
    """A memory that is not as it was saved is refused, and so is one of other tensors with a digest that fits."""
    net, whole = memory()
    harmed, path = damaged(whole, data), FOLDER / "b.mem"
    if data.draw(st.booleans()):
        tensors = safetensors.torch.load(whole)
        name = data.draw(st.sampled_from(sorted(tensors)))
        other = [torch.zeros(3), torch.zeros(()), torch.zeros_like(tensors[name], dtype=torch.int32), None]
        tensors[data.draw(st.sampled_from([name, "more"]))] = data.draw(st.sampled_from(other))
        tensors = {key: value for key, value in tensors.items() if value is not None}
        said = {"format": "mmrec-memory", "version": "1", "model": "hash"}
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
    write_parquet(FOLDER / "a.parquet", ["one", None, "two", "two"])
    files = {"a.jsonl": lines, "a.txt": lines, "a.xml": pages, "a.tar": tar_of({"a.txt": b"one"}, "w")}
    files |= {"a.tfrecord": record_of("one") + record_of(None), "openwebtext.tar": tar_of({"1_data.xz": inner}, "w")}
    files["a.parquet"] = (FOLDER / "a.parquet").read_bytes()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
    packed = {f"{name}.{end}": pack[end](files[name]) for end in pack for name in ("a.jsonl", "a.tar", "a.xml")}
    return files | packed


def large_file(data: st.DataObject) -> None:
    """A file of a large corpus gives its texts, sets records aside, or is refused in one line."""
    name = data.draw(st.sampled_from(sorted(large_files())))
    path = FOLDER / f"damaged-{name}" if not name.startswith("openwebtext") else FOLDER / name
    path.write_bytes(damaged(large_files()[name], data))
    try:
        records = list(documents_of(Shard(str(reader_of(name)), str(path)), "text"))
    except UserError as error:
        said = str(error)
        assert path.name in said
        return
    for record in records:
        assert isinstance(record, Rejected) or record.encode("utf-8").strip()


def config_file(data: st.DataObject) -> None:
    """A config file may say anything: it is taken, or refused in one line."""
    shipped = yaml.safe_load(find_config(data.draw(st.sampled_from(sorted(shipped_configs())))).read_text())
    if data.draw(st.booleans()):
        text = yaml.safe_dump(altered(shipped or {}, data))
    else:
        text = damaged(yaml.safe_dump(shipped).encode(), data).decode(errors="replace")
    path = FOLDER / "config.yaml"
    path.write_text(text)
    assert_handled(["fit", "--config", str(path), "--print_config"])


def arguments(data: st.DataObject) -> None:
    """Arguments may be anything: the command does its work, or refuses in one line."""
    command, options = data.draw(st.sampled_from(COMMANDS))
    words = st.sampled_from(["sample", "tokens", "config.yaml", "0", "-1", "0.5", "bytes", "", "-", "\udcff", "[]"])
    parts = st.sampled_from([f"--{option}" for option in options.split()]) | words | st.text(max_size=5)
    joined = st.builds("--{}={}".format, st.sampled_from(options.split()), words | VALUES.map(str))
    drawn = data.draw(st.lists(parts | joined, max_size=5))
    assert_handled([*command, *(argument.replace("\0", "") for argument in drawn)])  # no system passes zeros on


COMMANDS = [
    (["prepare", "--mirror=nowhere"], "output_dir input_file input_dir val_split tokenizer vocab_size"),
    (["prepare", "--verify"], "output_dir force vocab_size encoding glob corpus"),
    (["generate"], "ckpt prompt length temperature top_k top_p seed run root"),
    (["validate"], "ckpt_path run data.corpus trainer.devices model.shape.dim"),
    (["fit", "--print_config"], "config data.seq_len model trainer.max_steps last run"),
]
"""Commands that neither train nor reach the network, and options of theirs."""


def assert_handled(args: list[str]) -> None:
    """Run a command in the scratch folder: it ends well, or with status 2 after one line."""
    output, errors = io.StringIO(), io.StringIO()
    with chdir(FOLDER), redirect_stdout(output), redirect_stderr(errors):
        try:
            status = main(args)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            torch.set_flush_denormal(False)  # as in conftest
    assert status in (0, 2)
    if status == 2:
        assert errors.getvalue().count("\n") == 1, errors.getvalue()


Target = Callable[[st.DataObject], None]
TARGETS: list[tuple[Target, int, int]] = [
    (round_trip, 200, 20_000),
    (streamed, 200, 15_000),
    (tokenizer_state, 200, 6_000),
    (every_token_once, 100, 8_000),
    (text_file, 400, 20_000),
    (play, 200, 10_000),
    (documents, 200, 10_000),
    (damaged_tokens, 200, 6_000),
    (manifest, 200, 6_000),
    (damaged_checkpoint, 100, 5_000),
    (other_checkpoint, 100, 4_000),
    (memory_file, 100, 3_000),
    (large_file, 200, 10_000),
    (config_file, 10, 400),
    (arguments, 30, 2_000),
]
"""What is fuzzed, and on how many inputs: always, and in the slow part."""


def fuzz(target: Target, inputs: int) -> int:
    """Run ``target`` on ``inputs`` inputs; return how many were drawn to their end."""
    tried = 0

    @seed(0)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal tried
        target(data)
        tried += 1

    run()
    return tried


@pytest.mark.parametrize(("target", "inputs"), [pytest.param(t, few, id=t.__name__) for t, few, _ in TARGETS])
def test_some_inputs(target: Target, inputs: int) -> None:
    assert fuzz(target, inputs)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize(("target", "inputs"), [pytest.param(t, many, id=t.__name__) for t, _, many in TARGETS])
def test_many_inputs(target: Target, inputs: int, figure: Figure) -> None:
    assert fuzz(target, inputs) >= inputs
    promise = " ".join(str(target.__doc__).split()).rstrip(".")
    figure(promise[0].lower() + promise[1:], f"{inputs:,} inputs")


def test_many_are_a_hundred_thousand() -> None:
    assert sum(many for _, _, many in TARGETS) >= 100_000
