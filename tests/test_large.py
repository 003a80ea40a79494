"""Corpora that outgrow memory: every layout, damage, restarts, the split, and equal results whoever does the work."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure

from mmrec.errors import UserError
from mmrec.large.mediawiki import split_dump
from mmrec.large.readers import READERS
from mmrec.large.records import LONGEST, Record, Rejected
from mmrec.large.shards import Shard
from mmrec.large.sources import SOURCES, find_shards, reader_of
from mmrec.large.work import documents, hash_of
from mmrec.tokens import TokenFolder, open_tokens

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

Command = Callable[..., int]


def texts(count: int = 120) -> list[str]:
    """Documents of real text: paragraphs of Python's own help."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in sorted(topics) for part in str(topics[name]).split("\n\n") if len(part) > 40]
    return list(dict.fromkeys(paragraphs))[:count]


def read(shard: Shard, field: str = "text") -> list[Record]:
    return list(READERS[shard.reader](shard, field))


def write_json_lines(path: Path, documents: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def tar_of(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_openwebtext(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    subsets = {}
    for k in range(2):
        inner = {f"{i:07d}-{k}abc.txt": text.encode() for i, text in enumerate(documents[k::2])}
        subsets[f"openwebtext/urlsf_subset{k:02d}-{k}_data.xz"] = tar_of(inner | {f"{k}.lock": b""})
    (folder / "openwebtext.tar.xz").write_bytes(tar_of(subsets))
    return folder / "openwebtext.tar.xz"


def record_of(text: str | bytes | None) -> bytes:
    """A record of a tfrecord file, as TensorFlow Datasets writes C4."""
    crc = pytest.importorskip("google_crc32c").value
    example = pytest.importorskip("tfrecord.example_pb2").Example()
    if text is not None:
        value = text.encode() if isinstance(text, str) else text
        example.features.feature["text"].bytes_list.value.append(value)
    example.features.feature["url"].bytes_list.value.append(b"http://example.org")

    def masked(data: bytes) -> bytes:
        value = crc(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    data = example.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table({column: arrow.array(documents, arrow.string()), "id": list(range(len(documents)))})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=50)


WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename></siteinfo>
"""


def page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    from xml.sax.saxutils import escape

    tag = '<redirect title="x" />' if redirect else ""
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{tag}<revision><id>2</id>"
        f'<text bytes="1" xml:space="preserve">{escape(text)}</text></revision></page>\n'
    )


def write_wikipedia(folder: Path, articles: list[str]) -> Path:
    """A multistream dump with its index: a stream for the head, then one for every ten pages, then the end."""
    import bz2

    folder.mkdir(parents=True, exist_ok=True)
    dump, index = bz2.compress(WIKI.encode()), ""
    for first in range(0, len(articles), 10):
        some = "".join(page(f"T{first + i}", text) for i, text in enumerate(articles[first : first + 10]))
        some += page("Talk:T", "chat", namespace=1) + page("Old", "#REDIRECT [[T]]", redirect=True)
        index += "".join(f"{len(dump)}:{i}:T{i}\n" for i in range(first, min(first + 10, len(articles))))
        dump += bz2.compress(some.encode())
    dump += bz2.compress(b"</mediawiki>\n")
    path = folder / "enwiki-latest-pages-articles-multistream.xml.bz2"
    path.write_bytes(dump)
    (folder / "enwiki-latest-pages-articles-multistream-index.txt.bz2").write_bytes(bz2.compress(index.encode()))
    return path


def tokens_of(folder: Path) -> dict[str, str]:
    """Digests of what a preparation wrote."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def split_at_separator(tokens: TokenFolder, part: str) -> list[str]:
    values = np.asarray(getattr(tokens, part))
    separator = tokens.tokenizer.separator
    assert separator is not None
    assert values[0] == separator
    pieces = np.split(values, np.flatnonzero(values == separator))[1:]
    return [tokens.tokenizer.decode(piece[1:]) for piece in pieces]


# Readers


def test_json_lines_set_bad_records_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\nnot json\n{"text": 3}\n[1]\n{"other": "x"}\n{"text": "two"}')
    assert read(Shard("jsonl", str(path))) == [
        "one",
        Rejected("not JSON", "line 3"),
        Rejected("no text in text", "line 4"),
        Rejected("no text in text", "line 5"),
        Rejected("no text in text", "line 6"),
        "two",
    ]
    assert read(Shard("jsonl", str(path)), "other")[5] == "x" or "x" in read(Shard("jsonl", str(path)), "other")


def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.large.readers.LONGEST", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert read(Shard("jsonl", str(path))) == [Rejected("longer than 32 MiB", "line 1"), "short"]
    assert LONGEST == 1 << 25


@pytest.mark.parametrize("end", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path: Path, end: str) -> None:
    import bz2

    zstd = pytest.importorskip("backports.zstd")
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}[end]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts())
    path = tmp_path / f"a.jsonl{end}"
    path.write_bytes(pack(data))
    assert read(Shard("jsonl", str(path))) == texts()
    if end:
        path.write_bytes(pack(data)[:-20])
        with pytest.raises(UserError, match=f"a.jsonl{end}: is cut short or damaged"):
            read(Shard("jsonl", str(path)))


@pytest.mark.reliability
def test_files_that_expand_absurdly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """A few kilobytes that hold 20 MB, and a table that says one text 200 times."""
    import bz2

    zstd, parquet = pytest.importorskip("backports.zstd"), pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("mmrec.large.records.LONGEST", 1 << 20)
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
    member = tarfile.TarInfo("zeros.txt")
    member.size = 10**9
    line = json.dumps({"text": "a" * 10**6}).encode() + b"\n"
    bombs = {f"a.{kind}.{end}": line * 20 for kind in ("jsonl", "txt") for end in pack}
    bombs |= {"a.tar.gz": member.tobuf() + bytes(20 * 10**6), "a.xml.bz2": b"<mediawiki>" + b" " * 20 * 10**6}
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(pack[name.rpartition(".")[2]](data))
    parquet.write_table(arrow.table({"text": ["a" * 10**5] * 200}), tmp_path / "a.parquet")
    names = [*bombs, "a.parquet"]
    for name in names:
        path = tmp_path / name
        assert path.stat().st_size < 30_000
        with pytest.raises(UserError, match=rf"{name}: is cut short or damaged .*which is no text"):
            for _ in READERS[str(reader_of(name))](Shard("", str(path)), "text"):
                pass
    figure("files of large corpora that expand absurdly are refused", f"{len(names)} of {len(names)}")


@pytest.mark.reliability
def test_names_and_links_in_archives_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    """Archives are never unpacked: a name is only a name, and a link no text."""
    (tmp_path / "work").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.chdir(tmp_path / "work")
    with tarfile.open("a.tar", "w") as archive:
        for name in ("../out.txt", "/tmp/out-of-mmrec.txt", "good.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("link.txt")
            member.type, member.linkname = kind, "../secret.txt"
            archive.addfile(member)
    assert read(Shard("tar", "a.tar")) == ["text"] * 3
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "secret.txt",
        "work",
        "work/a.tar",
    ]
    assert not Path("/tmp/out-of-mmrec.txt").exists()
    figure("'..', absolute names, links and devices in tars lead nowhere: none is unpacked", "7 of 7")


def test_text_files_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.large.readers.PIECE", 100)
    path = tmp_path / "a.txt"
    text = "".join(f"line {i} of some Çöğü text\n" for i in range(50))
    path.write_text(text, encoding="utf-8")
    pieces = [piece for piece in read(Shard("text", str(path))) if isinstance(piece, str)]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [*texts(), None])
    shard = Shard("parquet", str(tmp_path / "a.parquet"))
    assert read(shard) == [*texts(), Rejected("no text in text", "row 121")]
    with pytest.raises(UserError, match="has no column 'body', but text, id"):
        read(shard, "body")
    monkeypatch.setattr("mmrec.large.readers.LONGEST", len(texts()[0]) - 1)
    assert Rejected("longer than 32 MiB", "row 1") in read(shard)
    data = Path(shard.path).read_bytes()
    Path(shard.path).write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"a\.parquet: is cut short or damaged"):
        read(shard)


def test_a_parquet_file_of_one_row_group_is_read_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default pyarrow fetches the whole column of a row group: of all the file here."""
    arrow = pytest.importorskip("pyarrow")
    choose = random.Random(0)
    data = [choose.randbytes(5000).hex() for _ in range(800)]
    table = arrow.table({"text": data})
    pytest.importorskip("pyarrow.parquet").write_table(
        table, tmp_path / "a.parquet", data_page_size=1 << 14, write_batch_size=16
    )
    asked: list[int] = []

    class Recorder(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    monkeypatch.setattr("mmrec.large.readers.PIECE", 1 << 16)
    monkeypatch.setattr("mmrec.large.readers.open_raw", Recorder)
    assert read(Shard("parquet", str(tmp_path / "a.parquet"))) == data
    assert (tmp_path / "a.parquet").stat().st_size > 4_000_000
    assert max(asked) < 2_000_000


def test_tfrecord(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.tfrecord-00000-of-01024"
    data = b"".join(record_of(text) for text in [*texts(), None, b"\xff\xfe"])
    path.write_bytes(data)
    assert reader_of(str(path)) == "tfrecord"
    shard = Shard("tfrecord", str(path))
    *good, none, bad = read(shard)
    assert good == texts()
    assert (none, bad) == (Rejected("no text in text", "record 121"), Rejected("not UTF-8", "record 122"))
    for damaged in (data[:-3], data[:-20], data[:5], data[:40] + b"?" + data[41:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is cut short or damaged"):
            read(shard)


def test_the_library_reads_our_tfrecords_the_same(tmp_path: Path) -> None:
    loader = pytest.importorskip("tfrecord.reader").tfrecord_loader
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(record_of(text) for text in texts()))
    theirs = [bytes(row["text"]).decode() for row in loader(str(path), None, {"text": "byte"})]
    assert read(Shard("tfrecord", str(path))) == theirs


def test_openwebtext(tmp_path: Path) -> None:
    path = write_openwebtext(tmp_path / "owt", texts())
    (shard,) = find_shards("openwebtext", [str(path)])
    assert shard.reader == "tars"
    assert read(shard) == texts()[::2] + texts()[1::2]
    # Unpacked once, its files are shards of their own.
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    shards = find_shards("openwebtext", [str(tmp_path / "out")])
    assert [shard.reader for shard in shards] == ["tar", "tar"]
    assert [text for shard in shards for text in read(shard)] == texts()[::2] + texts()[1::2]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut short or damaged"):
        read(shard)


def test_wikipedia(tmp_path: Path) -> None:
    articles = [f"'''T{i}''' is a [[link|word]] of {{{{tpl|x}}}} page {i}." for i in range(35)]
    path = write_wikipedia(tmp_path, articles)
    whole = read(Shard("mediawiki", str(path)))
    assert whole == [f"T{i} is a word of  page {i}." for i in range(35)]
    index = str(path).replace("multistream.xml", "multistream-index.txt")
    shards = split_dump(str(path), index, part_bytes=200)
    assert len(shards) > 2
    assert [text for shard in shards for text in read(shard)] == whole
    assert find_shards("wikipedia", [str(tmp_path)]) == split_dump(str(path), index)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="cut short or damaged"):
        read(shards[-1])
    with pytest.raises(UserError, match="cut short or damaged"):
        read(Shard("mediawiki", str(path)))


def test_a_part_cut_short_in_a_range(tmp_path: Path) -> None:
    path = write_wikipedia(tmp_path, ["text"] * 30)
    size = path.stat().st_size
    with pytest.raises(UserError, match="ends before the last stream"):
        read(Shard("mediawiki", str(path), 10, size + 100))


@pytest.mark.slow
def test_real_dumps_are_read_as_by_the_libraries_themselves(tmp_path: Path) -> None:
    """Pages of the English and the Bulgarian Wikipedia that the gensim package carries; the former in streams."""
    import bz2
    import zipfile

    mwxml, parser = pytest.importorskip("mwxml"), pytest.importorskip("mwparserfromhell")
    options = ["-q", "--no-deps", "--retries", "0", "-d", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "download", *options, "gensim==4.4.0"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("gensim's wheel, which holds the dumps, cannot be had")
    english, bulgarian = tmp_path / "en.xml.bz2", tmp_path / "bg.xml.bz2"
    with zipfile.ZipFile(next(tmp_path.glob("gensim*.whl"))) as archive:
        data = "gensim/test/test_data/"
        name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        english.write_bytes(archive.read(data + name))
        bulgarian.write_bytes(archive.read(f"{data}bgwiki-latest-pages-articles-shortened.xml.bz2"))

    def expected(dump: Path) -> list[str]:
        with bz2.open(dump) as file:
            entries = ((page, list(page)) for page in mwxml.Dump.from_file(file))
            articles = (last[-1] for page, last in entries if page.namespace == 0 and page.redirect is None)
            return [parser.parse(article.text or "").strip_code() for article in articles]

    head, *pages = bz2.decompress(english.read_bytes()).split(b"  <page>")
    assert len(pages) == 206
    streams, index = bz2.compress(head), ""
    for first in range(0, len(pages), 20):
        index += f"{len(streams)}:{first}:T\n"
        streams += bz2.compress(b"".join(b"<page>" + page for page in pages[first : first + 20]))
    cut, beside = tmp_path / "en-multistream.xml.bz2", tmp_path / "index.txt"
    cut.write_bytes(streams)
    beside.write_text(index)
    shards = split_dump(str(cut), str(beside), part_bytes=400_000)
    assert len(shards) == 4
    texts = expected(english)
    assert len(texts) == 106
    assert [text for shard in shards for text in read(shard)] == texts
    assert read(Shard("mediawiki", str(bulgarian))) == expected(bulgarian)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("c4-train.00000-of-01024.json.gz", "jsonl"),
        ("train-00000-of-00080.parquet", "parquet"),
        ("c4-train.tfrecord-00000-of-01024", "tfrecord"),
        ("urlsf_subset00-1_data.xz", "tar"),
        ("openwebtext.tar.xz", "tars"),
        ("enwiki-latest-pages-articles1.xml-p1p41242.bz2", "mediawiki"),
        ("enwiki-latest-pages-articles-multistream-index.txt.bz2", None),
        ("notes.md", "text"),
        ("a.jsonl.zst", "jsonl"),
        ("picture.png", None),
        (".hidden.txt", None),
        ("README", None),
    ],
)
def test_the_reader_of_a_name(name: str, reader: str | None) -> None:
    assert reader_of(f"folder.with.dots/{name}") == reader


# The whole way


def make_folder(folder: Path, count: int = 120) -> Path:
    """A folder with every format of one's own: some texts twice, some records bad."""
    pieces = texts(count)
    write_json_lines(folder / "a.jsonl", pieces[:40])
    write_json_lines(folder / "b" / "b.json.gz", [*pieces[40:60], pieces[0], pieces[1], "  "])
    write_parquet(folder / "c.parquet", [*pieces[60:100], None])
    for i, text in enumerate(pieces[100:]):
        (folder / f"{i}.md").write_text(text, encoding="utf-8")
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b"{broken\n")
    return folder


def test_a_folder_of_everything(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "mine")
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "2", "--drop_duplicates") == 0
    tokens = open_tokens(Path("out"))
    train, val = split_at_separator(tokens, "train"), split_at_separator(tokens, "val")
    assert sorted(train + val) == sorted(texts())
    # Whether a document validates is decided by its text alone.
    share = int(0.05 * 2**64)
    assert set(val) == {text for text in texts() if int(hash_of(text.encode())[0]) < share}
    manifest = tokens.manifest
    assert manifest["rejected"] == {"empty": 1, "no text in text": 1, "not JSON": 1}
    assert manifest["documents"]["duplicates"]["documents"] == 2
    assert sum(part["documents"] for part in manifest["documents"].values()) == 122
    rejected = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    assert {(Path(row["file"]).name, row["reason"]) for row in rejected} == {
        ("a.jsonl", "not JSON"),
        ("b.json.gz", "empty"),
        ("c.parquet", "no text in text"),
    }
    assert not Path("out.work").exists()
    said = capsys.readouterr().out
    assert "set aside   3 records: 1 empty, 1 no text in text, 1 not JSON" in said
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1", "--drop_duplicates") == 0
    assert "already prepared" in capsys.readouterr().out
    assert mmrec("prepare", "--verify", "--output_dir", "out") == 0
    assert mmrec("prepare", "mine", "--output_dir", "out") == 2
    assert "already holds another corpus" in capsys.readouterr().err


def test_it_trains_and_writes(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers import fit

    make_folder(tmp_path / "mine")
    options = ["--output_dir", "out", "--tokenizer", "bpe", "--vocab_size", "300", "--workers", "1"]
    assert mmrec("prepare", "mine", *options) == 0
    assert open_tokens(Path("out")).tokenizer.vocab_size == 300
    reset = "--model.reset_at_documents=true"
    assert mmrec(*fit(Path("out"), "--trainer.max_steps=3", "--run=r", reset)) == 0
    assert mmrec("generate", "--run", "r", "--ckpt", "last", "--length", "5", "--prompt", "The") == 0


def test_the_result_does_not_depend_on_the_workers(mmrec: Command, tmp_path: Path) -> None:
    make_folder(tmp_path / "mine")
    for workers in (1, 3):
        assert mmrec("prepare", "mine", "--output_dir", f"out{workers}", "--workers", str(workers)) == 0
    assert tokens_of(Path("out1")) == tokens_of(Path("out3"))


def test_c4_keeps_its_own_validation_files(mmrec: Command, tmp_path: Path) -> None:
    pieces = texts()
    for k in range(2):
        write_json_lines(tmp_path / "c4" / f"c4-train.{k:05d}-of-01024.json.gz", pieces[k:100:2])
    write_json_lines(tmp_path / "c4" / "c4-validation.00000-of-00008.json.gz", [*pieces[100:], pieces[3]])
    assert mmrec("prepare", "c4", "c4", "--output_dir", "out", "--tokenizer", "bytes", "--drop_duplicates") == 0
    tokens = open_tokens(Path("out"))
    assert split_at_separator(tokens, "val") == [*pieces[100:], pieces[3]]
    # The text that is in both is kept where it validates.
    assert sorted(split_at_separator(tokens, "train")) == sorted(set(pieces[:100]) - {pieces[3]})


def test_a_file_cut_short_is_named_and_the_rest_is_kept(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = texts()
    for k in range(3):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl.gz", pieces[k::3])
    good = (tmp_path / "in" / "1.jsonl.gz").read_bytes()
    (tmp_path / "in" / "1.jsonl.gz").write_bytes(good[:-30])
    assert mmrec("prepare", "in", "--output_dir", "out", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert "in/1.jsonl.gz: is cut short or damaged" in error
    assert "Traceback" not in error
    assert {path.name for path in Path("out.work").glob("*.json")} >= {"000000.json", "000002.json"}
    assert not Path("out").exists()
    # A file that has changed since is no part of what was begun.
    (tmp_path / "in" / "1.jsonl.gz").write_bytes(good)
    assert mmrec("prepare", "in", "--output_dir", "out", "--workers", "1") == 2
    assert "the files have changed" in capsys.readouterr().err
    assert mmrec("prepare", "in", "--output_dir", "out", "--workers", "1", "--force") == 0


@pytest.mark.slow
def test_stopped_and_killed_in_the_middle_the_result_is_the_same(mmrec: Command, tmp_path: Path) -> None:
    pieces = texts(600)
    for k in range(12):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl", pieces[k::12] * 30)
    assert mmrec("prepare", "in", "--output_dir", "whole", "--workers", "1") == 0
    command = [sys.executable, "-m", "mmrec", "prepare", "in", "--output_dir", "parts", "--workers", "1"]
    kills = 0
    for wanted, kill in ((1, signal.SIGINT), (3, signal.SIGKILL), (6, signal.SIGKILL), (9, signal.SIGKILL)):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(Path("parts.work").glob("0*.json"))) >= wanted:
                os.killpg(process.pid, kill)
                kills += 1
                break
            time.sleep(0.002)
        _, error = process.communicate()
        if kill == signal.SIGINT:
            assert (process.returncode, error) == (130, "\nmmrec: stopped by Ctrl-C\n")
    assert kills >= 2  # the last ones may come too late on a busy machine
    assert subprocess.run(command, check=False).returncode == 0
    assert tokens_of(Path("parts")) == tokens_of(Path("whole"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["openwebtxt"], "did you mean 'openwebtext'"),
        (["nothing.jsonl"], "no such file or folder"),
        (["c4", "empty"], "no file of a format that is read here"),
        (["a.jsonl", "--tokenizer", "characters"], "needs the whole text at once"),
        (["a.jsonl", "--engine", "spark"], "unknown --engine 'spark'; known: local, ray, slurm"),
        (["a.jsonl", "--workers", "0"], "--workers is 0; it must be at least 1"),
        (["a.jsonl", "--text_field", "body"], "0 documents (set aside: 5 no text in body); at least two are needed"),
        (["a.jsonl", "--val_split", "2"], "it must lie between 0 and 1"),
        (["a.jsonl", "--engine", "slurm"], "needs Slurm's sbatch"),
        (["tiny_shakespeare", "a.jsonl"], "takes no files of yours"),
        (["s4://bucket/x"], "cannot be reached: Protocol not known"),
        (["c4"], "or get c4-train.*.json.gz and c4-validation.*.json.gz, or the tfrecord files elsewhere: mmrec"),
    ],
)
def test_bad_requests(
    mmrec: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    c4 = dataclasses.replace(SOURCES["c4"], url="http://127.0.0.1:9/c4")  # no network
    monkeypatch.setitem(SOURCES, "c4", c4)
    write_json_lines(tmp_path / "a.jsonl", texts(5))
    (tmp_path / "empty").mkdir()
    assert mmrec("prepare", *args, "--output_dir", "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_documents_that_are_no_text_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": " "}\n{"text": "fine"}\n')
    assert list(documents(Shard("jsonl", str(tmp_path / "a.jsonl")), "text")) == [Rejected("empty", ""), "fine"]
