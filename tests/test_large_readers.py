"""The readers of large corpora: every layout, damage, bad records, and files made to harm."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from conftest import Figure
from layouts import WIKI, page, record_of, texts, write_openwebtext, write_parquet, write_wikipedia

from mmrec.core.errors import UserError
from mmrec.data.pipeline import mediawiki
from mmrec.data.pipeline.formats import reader_of
from mmrec.data.pipeline.mediawiki import split_dump
from mmrec.data.pipeline.readers import READERS, ZERO_BYTE
from mmrec.data.pipeline.records import LONGEST, Record, Rejected
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.sources import find_shards
from mmrec.data.pipeline.wikitext import NAMES, clean

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def read(shard: Shard, field: str = "text") -> list[Record]:
    return list(READERS[shard.reader](shard, field))


def good(records: list[Record]) -> list[str]:
    return [record for record in records if isinstance(record, str)]


def test_json_lines_set_bad_records_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\nnot json\n{"text": 3}\n[1]\n{"other": "x"}\n{"text": "two"}')
    assert read(Shard("jsonl", str(path))) == [
        "one",
        Rejected("not JSON", "line 3"),
        Rejected("no text in text", "line 4", ("text (number)",)),
        Rejected("no text in text", "line 5"),
        Rejected("no text in text", "line 6", ("other",)),
        "two",
    ]
    assert "x" in read(Shard("jsonl", str(path)), "other")


def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.data.pipeline.json_lines.LONGEST", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert read(Shard("jsonl", str(path))) == [Rejected("longer than 32 MiB", "line 1"), "short"]
    assert LONGEST == 1 << 25


@pytest.mark.parametrize("end", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files(tmp_path: Path, end: str) -> None:
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
    zstd, parquet = pytest.importorskip("backports.zstd"), pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("mmrec.data.pipeline.records.LONGEST", 1 << 20)
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
    records = read(Shard("tar", "a.tar"))
    assert good(records) == ["text"] * 3
    assert [record for record in records if isinstance(record, Rejected)] == [
        Rejected("no file but a link or a device", "link.txt")
    ] * 4
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "secret.txt",
        "work",
        "work/a.tar",
    ]
    assert not Path("/tmp/out-of-mmrec.txt").exists()
    figure("'..', absolute names, links and devices in tars lead nowhere: none is unpacked", "7 of 7")


def test_text_files_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.data.pipeline.readers.PIECE", 100)
    path = tmp_path / "a.txt"
    text = "".join(f"line {i} of some Çöğü text\n" for i in range(50))
    path.write_text(text, encoding="utf-8")
    pieces = [piece for piece in read(Shard("text", str(path))) if isinstance(piece, str)]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)


def test_a_long_line_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Chinese text often comes: a cut inside a character made the whole piece no text."""
    monkeypatch.setattr("mmrec.data.pipeline.readers.PIECE", 100)
    monkeypatch.setattr("mmrec.data.pipeline.readers.LONGEST", 100)
    path = tmp_path / "a.txt"
    for text in ("a" * first + letter * 400 for first in range(4) for letter in ("ö", "春", "\U0001f600")):
        path.write_text(text, encoding="utf-8")
        pieces = read(Shard("text", str(path)))
        assert len(pieces) > 3
        assert "".join(map(str, pieces)) == text
    path.write_bytes(b"a" * 150 + b"\xf0\x9f")
    assert read(Shard("text", str(path))) == [Rejected("not UTF-8", "byte 0")]
    path.write_bytes(b"a" * 198 + b"\xf0\x9f")
    assert read(Shard("text", str(path))) == ["a" * 198, Rejected("not UTF-8", "byte 198")]


def test_a_plain_text_with_zero_bytes_is_rejected(tmp_path: Path) -> None:
    """All that is in UTF-16 without a byte order mark is UTF-8, too, if it is of ASCII letters."""
    path = tmp_path / "wide.txt"
    path.write_bytes("A text of letters.\n".encode("utf-16-le"))
    assert read(Shard("text", str(path))) == [Rejected(ZERO_BYTE, "byte 0")]
    assert read(Shard("text", str(path), encoding="utf-16-le")) == ["A text of letters.\n"]


def test_json_lines_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read(Shard("jsonl", str(path))) == ["one", "two"]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [*texts(), None])
    shard = Shard("parquet", str(tmp_path / "a.parquet"))
    assert read(shard) == [*texts(), Rejected("no text in text", "row 121")]
    with pytest.raises(UserError, match="has no column 'body', but text, id"):
        read(shard, "body")
    monkeypatch.setattr("mmrec.data.pipeline.readers.LONGEST", len(texts()[0]) - 1)
    assert Rejected("longer than 32 MiB", "row 1") in read(shard)
    data = Path(shard.path).read_bytes()
    Path(shard.path).write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"a\.parquet: is cut short or damaged"):
        read(shard)


def test_parquet_without_rows_without_text_and_with_repeated_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"

    def written(rows: list[object], kind: object) -> list[object]:
        parquet.write_table(arrow.table({"text": arrow.array(rows, kind)}), path, row_group_size=5)
        return list(read(Shard("parquet", str(path))))

    assert written([], arrow.string()) == []
    assert written([None] * 3, arrow.string()) == [Rejected("no text in text", f"row {n}") for n in (1, 2, 3)]
    with pytest.raises(UserError, match="the column 'text' is of type int64, not text; no column of it holds text"):
        written([1, 2], arrow.int64())
    repeated = ["ab", "abc" * 9] * 4
    assert written([*repeated], arrow.string()) == repeated
    monkeypatch.setattr(
        "mmrec.data.pipeline.readers.LONGEST", 20
    )  # the groups with the longer one are read by reference
    found = written([*repeated], arrow.string())
    assert found[::2] == repeated[::2]
    assert found[1::2] == [Rejected("longer than 32 MiB", f"row {n}") for n in (2, 4, 6, 8)]


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

    monkeypatch.setattr("mmrec.data.pipeline.readers.PIECE", 1 << 16)
    monkeypatch.setattr("mmrec.data.pipeline.readers.open_raw", Recorder)
    assert read(Shard("parquet", str(tmp_path / "a.parquet"))) == data
    assert (tmp_path / "a.parquet").stat().st_size > 4_000_000
    assert max(asked) < 2_000_000


def test_tfrecord(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.tfrecord-00000-of-01024"
    data = b"".join(record_of(text) for text in [*texts(), None, b"\xff\xfe"])
    path.write_bytes(data)
    assert reader_of(str(path)) == "tfrecord"
    shard = Shard("tfrecord", str(path))
    *whole, none, bad = read(shard)
    assert whole == texts()
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
    (shard,) = find_shards("openwebtext", [str(path)])[0]
    assert shard.reader == "tars"
    assert good(read(shard)) == texts()[::2] + texts()[1::2]
    # Unpacked once, its files are shards of their own.
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    shards = find_shards("openwebtext", [str(tmp_path / "out")])[0]
    assert [shard.reader for shard in shards] == ["tar", "tar"]
    assert [text for shard in shards for text in good(read(shard))] == texts()[::2] + texts()[1::2]
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
    found, skipped = find_shards("wikipedia", [str(tmp_path)])
    assert found == split_dump(str(path), index)
    assert [row["skipped"] for row in skipped.rows] == ["index of a dump"]
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
def test_real_dumps_are_read_as_by_the_libraries_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the English and the Bulgarian Wikipedia that the gensim package carries; the former in streams."""
    import zipfile

    clean_once = cache(clean)  # for the libraries' articles, and not for seconds again for the reader's
    monkeypatch.setattr(mediawiki, "clean", lambda text, hidden: clean_once(text, frozenset(hidden)))
    mwxml = pytest.importorskip("mwxml")
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
            site = mwxml.Dump.from_file(file)
            named = (n.name.lower() for n in site.site_info.namespaces if n.id in (-2, 6, 14))
            hidden = frozenset({*NAMES, *named})
            entries = ((page, list(page)) for page in site)
            articles = (last[-1] for page, last in entries if page.namespace == 0 and page.redirect is None)
            return [clean_once(article.text or "", hidden) for article in articles]

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


def test_a_huge_page_is_dropped_as_it_is_read(tmp_path: Path) -> None:
    """Pages of 20 MB and more between two that are read: what is held of them at once is far less."""
    path = tmp_path / "a.xml"
    with open(path, "w") as file:
        file.write(f"{WIKI}{page('First', 'one')}")
        for title in ("Huge & long", "Larger"):
            head, tail = page(title, "TEXT").split("TEXT")
            file.write(head + "A line of it &amp; an end.\n" * 700_000 + "x" * 9_000_000 + tail)
        file.write(f"{page('Last', 'a' * (1 << 21))}</mediawiki>")
    records: list[Record] = []
    tracemalloc.start()
    for record in READERS["mediawiki"](Shard("mediawiki", str(path)), "text"):
        records.append(record if isinstance(record, Rejected) else record[:5])
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    asides = [Rejected("longer than 2 MiB", title) for title in ("Huge & long", "Larger")]
    assert records == ["one", *asides, "aaaaa"]
    assert held < 30_000_000


def test_of_several_revisions_the_last_one_is_read(tmp_path: Path) -> None:
    first, last = "<revision><text>old</text></revision>", "<revision><id>3</id><text>new</text></revision>"
    empty = "<page><title>E</title><ns>0</ns><revision><text /></revision></page>"
    other = "<page><title>N</title><ns></ns><revision><text>of no namespace</text></revision></page>"
    without = "<page><revision><text>untold</text></revision></page><page><title>R</title></page>"
    path = tmp_path / "a.xml"
    path.write_text(f"{WIKI}<page><title>T</title><ns>0</ns>{first}{last}</page>{empty}{other}{without}</mediawiki>")
    assert read(Shard("mediawiki", str(path))) == [
        "new",
        Rejected("no text", "E"),
        "untold",
        Rejected("no text", "R"),
    ]
    path.write_text(f"{WIKI}<page><title>T</title>{first}</page>")
    with pytest.raises(UserError, match=r"a\.xml: is cut short or damaged"):
        read(Shard("mediawiki", str(path)))


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


def test_a_packed_file_says_in_its_name_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=r"1 packed, and not named after what it holds, as NAME\.txt\.gz\): a\.gz"):
        find_shards(None, [str(tmp_path / "a.gz")])


def test_a_file_that_is_named_twice_is_one_shard(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / f"{name}.txt").write_text(name)
    first, other = str(tmp_path / "folder" / "a.txt"), str(tmp_path / "folder")
    shards, provenance = find_shards(None, [first, other, first])
    assert [Path(shard.path).name for shard in shards] == ["a.txt", "b.txt"]
    assert [row["skipped"] for row in provenance.rows] == ["named before"] * 2
