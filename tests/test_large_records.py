"""Records as other programs write them, in files that are not quite what their names say: read, or the reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from layouts import split_at_separator, tar_of, texts, write_json_lines

from mmrec.core.errors import UserError
from mmrec.data.pipeline.readers import READERS
from mmrec.data.pipeline.records import Record, Rejected
from mmrec.data.pipeline.shards import Shard
from mmrec.data.store import open_tokens

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def read(path: Path, reader: str = "jsonl", field: str = "text") -> list[Record]:
    return list(READERS[reader](Shard(reader, str(path)), field))


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "other",
    ["NaN", "-Infinity", '"half: \\ud83d"', deep(900), deep(10**5), '{"text": "inner", "a": [1, "]"]}', "1e999"],
)
def test_a_strange_value_of_another_field_does_not_matter(tmp_path: Path, other: str) -> None:
    text = 'a "text", with \\ and \u4e16\u754c'
    lines = [f'{{"a": {other}, "text": {json.dumps(text)}}}', f'{{"text": {json.dumps(text)}, "z": {other}}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == [text, text]


def test_what_is_no_json_is_rejected(tmp_path: Path) -> None:
    bad = ['{"text": "x"', '{"text": "x"}}', '{"text": ' + "[" * 100_000 + "]}", "{text: 1}", '{"text": "x" "y"}']
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "first"}', *bad]))
    assert read(tmp_path / "a.jsonl") == ["first", *(Rejected("not JSON", f"line {n}") for n in range(2, 7))]


RECORDS = [{"text": text} for text in texts(5)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(RECORDS), "a JSON array instead of a record a line (jq -c '.[]'"),
        (json.dumps(RECORDS, indent=1), "a JSON array instead of a record a line"),
        (json.dumps({"data": RECORDS}, indent=1), "JSON over several lines instead of a record a line"),
        ("\n".join(map(json.dumps, RECORDS)).encode("utf-16"), "UTF-16 instead of UTF-8 (--encoding utf-16"),
        (b'{"text": "caf\xe9"}', "0 documents (set aside: 1 not JSON)"),
        ("\n".join(json.dumps({"data": record, "id": 1}) for record in RECORDS), "have data.text, id (number)"),
        ("\n".join(json.dumps({"messages": [record]}) for record in RECORDS), "the records have messages (list)"),
        ("\n".join(json.dumps({"body": record["text"], "text": None}) for record in RECORDS), "body, text (null)"),
    ],
)
def test_why_there_are_no_documents(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, says: str
) -> None:
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert mmrec("prepare", "a.json", "--output_dir", "out", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert "0 documents (set aside: " in error


def test_the_text_may_be_in_an_inner_object(tmp_path: Path) -> None:
    lines = [{"data": {"text": "one"}}, {"data.text": "two"}, {"data": {"text": 3}}, {"data": 4}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [record for record in read(tmp_path / "a.jsonl", field="data.text") if isinstance(record, str)] == [
        "one",
        "two",
    ]


def write_column(path: Path, values: list[Any], kind: Any) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": arrow.array(values, kind), "body": ["x"] * len(values), "n": [1] * len(values)})
    parquet.write_table(table, path)


def test_a_column_that_holds_no_text_is_named_with_its_type(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    message = arrow.list_(arrow.struct([("role", arrow.string())]))
    for values, kind, says in (
        ([["a"], ["b"]], arrow.list_(arrow.string()), r"list<.*string>"),
        ([{"a": "x"}] * 2, arrow.struct([("a", arrow.string())]), r"struct<a: string>"),
        ([[{"role": "user"}]] * 2, message, r"list<.*struct<role: string>>"),
        ([1, 2], arrow.int64(), "int64"),
    ):
        write_column(path, values, kind)
        with pytest.raises(UserError, match=rf"a\.parquet: the column 'text' is of type {says}, not text; .*: body$"):
            read(path, "parquet")


def test_a_column_of_bytes_is_read_as_utf_8(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    for kind in (arrow.binary(), arrow.large_binary(), arrow.dictionary(arrow.int32(), arrow.binary())):
        write_column(path, ["d\u00e9j\u00e0".encode(), b"\xff", None], kind)
        expected = ["d\u00e9j\u00e0", Rejected("not UTF-8", "row 2"), Rejected("no text in text", "row 3")]
        assert read(path, "parquet") == expected


def test_members_of_an_archive_count_by_the_rule_of_files(tmp_path: Path) -> None:
    files = {"a.txt": b"one", "._a.txt": b"\0\5", "b.txt.gz": gzip.compress(b"two")}
    files |= {"c.jsonl": b'{"text": "three"}\n7', "d.png": b"\x89PNG"}
    files |= {"dir/.DS_Store": b"\0", "e.csv": b"a,b", "LICENSE": b"MIT", "F.MD": b"four"}
    files |= {"__MACOSX/g.txt": b"x", "h.parquet": b"PAR1"}
    for name, mode in (("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar", "w")):
        (tmp_path / name).write_bytes(tar_of(files, mode))
        records = read(tmp_path / name, "tar")
        assert [record for record in records if isinstance(record, str)] == ["one", "two", "three", "four"]
        assert {(r.where, r.reason) for r in records if isinstance(r, Rejected)} == {
            ("._a.txt", "hidden"),
            ("c.jsonl: line 2", "no text in text"),
            ("d.png", "no format that is read"),
            ("dir/.DS_Store", "hidden"),
            ("e.csv", "no format that is read"),
            ("LICENSE", "no format that is read"),
            ("__MACOSX/g.txt", "hidden"),
            ("h.parquet", "no format that is read inside of an archive"),
        }


NAMES = ["F.TXT", "a.txt", "b.Md", "c.text", "d.csv", "e.html", "g.rst", "h.txt.bak", "noext", ".hidden.txt"]
TEXTS = {"F.TXT", "a.txt", "b.Md", "c.text", "g.rst"}


@pytest.mark.parametrize("option", ["folder", "--input_dir"])
def test_what_is_read_and_what_is_skipped_is_the_same_either_way(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    folder = tmp_path / "mine"
    (folder / ".git").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(f"the text of {name}\n" * 20)
    command = ["--workers", "1", "mine"] if option == "folder" else [option, "mine"]
    assert mmrec("prepare", *command, "--output_dir", "out") == 0
    out = capsys.readouterr().out
    assert "skipped     6 files (2 hidden, 4 no format that is read): " in out
    assert "; see sources.jsonl" in out
    rows = [json.loads(line) for line in Path("out/sources.jsonl").read_text().splitlines()]
    assert {Path(row["file"]).name for row in rows if "skipped" not in row} == TEXTS
    assert {Path(row["file"]).name for row in rows if "skipped" in row} == {*NAMES, ".git"} - TEXTS
    assert all(row["documents"] == 1 and row["bytes"] > 100 for row in rows if "skipped" not in row)
    manifest = open_tokens(Path("out")).manifest
    assert manifest["sources"] == {"read": 5, "skipped": {"hidden": 2, "no format that is read": 4}}
    assert mmrec("prepare", "--verify", "--output_dir", "out") == 0


def test_a_glob_takes_names_in_any_case(mmrec: Command, tmp_path: Path) -> None:
    for name in ("A.HTML", "b.html", "c.txt"):
        (tmp_path / name).write_text(f"the text of {name}\n" * 20)
    assert mmrec("prepare", "--input_dir", ".", "--glob", "*.html", "--output_dir", "out") == 0
    assert open_tokens(Path("out")).manifest["sources"] == {"read": 2, "skipped": {"not named *.html": 1}}


def test_a_folder_without_a_text_says_what_is_there(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.csv").write_text("a,b")
    for command in (["mine"], ["--input_dir", "mine"]):
        assert mmrec("prepare", *command, "--output_dir", "out") == 2
        assert "skipped 1 files (1 no format that is read): a.csv" in capsys.readouterr().err
    write_json_lines(tmp_path / "mine" / "b.jsonl", texts(3))
    assert mmrec("prepare", "--input_dir", "mine", "--output_dir", "out") == 2
    assert "1 no text file, but read without --input_dir" in capsys.readouterr().err


def test_texts_that_are_not_utf_8_are_counted_and_the_way_to_read_them_is_said(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "mine" / name).write_bytes(f"d\u00e9j\u00e0 vu {name}\n".encode("cp1252") * 20)
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1") == 2
    assert "2 not UTF-8); name the encoding of files of text by --encoding" in capsys.readouterr().err
    assert mmrec("prepare", "--input_dir", "mine", "--encoding", "cp1252", "--output_dir", "out") == 0


ENCODED = "D\u00e9j\u00e0 vu, na\u00efvet\u00e9 {}, \u20ac 5\r\n"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "UTF8"])
def test_an_encoding_holds_for_every_path_of_text(mmrec: Command, tmp_path: Path, encoding: str) -> None:
    """Files and folders that are named, compressed ones, JSON lines, and both of these inside of a tar."""
    wanted = [ENCODED.format(number) * 20 for number in range(6)]
    mine = tmp_path / "mine"
    mine.mkdir()
    lines = [
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in wanted[i : i + 2]) for i in (2, 4)
    ]
    (mine / "a.txt").write_bytes(wanted[0].encode(encoding))
    (mine / "c.jsonl").write_bytes(lines[0].encode(encoding))
    members = {"b.md": wanted[1].encode(encoding), "d.jsonl": lines[1].encode(encoding)}
    (mine / "e.tar.xz").write_bytes(tar_of(members))
    paths = [str(path) for path in sorted(mine.iterdir())]
    for number, sources in enumerate((["mine"], paths)):
        out = f"out{number}"
        assert mmrec("prepare", *sources, "--encoding", encoding, "--output_dir", out, "--workers", "1") == 0
        tokens = open_tokens(Path(out))
        assert tokens.manifest["rejected"] == {}
        joined = "".join(text for part in ("train", "val") for text in split_at_separator(tokens, part))
        assert sorted(joined) == sorted("".join(wanted))
    (mine / "one.txt.gz").write_bytes(gzip.compress(wanted[0].encode(encoding)))
    for number, name in enumerate(("a.txt", "one.txt.gz")):
        out = f"one{number}"
        assert mmrec("prepare", f"mine/{name}", "--encoding", encoding, "--output_dir", out, "--workers", "1") == 0
        tokens = open_tokens(Path(out))
        assert tokens.tokenizer.decode(np.concatenate([tokens.train, tokens.val])).replace("\n\n", "") == wanted[0]


def test_ascii_is_not_read_as_utf_16(mmrec: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_bytes(b"four" * 30)
    (mine / "b.jsonl").write_bytes(b'{"text": "of even length"}\r\n' * 4)
    (mine / "c.txt").write_bytes((ENCODED.format(3) * 9).encode("utf-16"))
    assert mmrec("prepare", "mine", "--encoding", "utf-16", "--output_dir", "out", "--workers", "1") == 0
    assert open_tokens(Path("out")).manifest["rejected"] == {"not utf-16": 2}


def test_what_is_not_in_the_encoding_is_set_aside(mmrec: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_bytes(ENCODED.format(1).encode("cp1252") * 9)
    (mine / "b.txt").write_bytes(b"\x81 is no letter of cp1252\n")
    (mine / "c.jsonl").write_bytes(b'{"text": "one line"}\n' * 9000 + b'{"text": "\x81"}\n')
    (mine / "d.tar").write_bytes(tar_of({"e.jsonl": b'{"text": "\x81"}\n', "f.txt": b"good\n"}, "w"))
    assert mmrec("prepare", "mine", "--encoding", "cp1252", "--output_dir", "out", "--workers", "1") == 0
    assert open_tokens(Path("out")).manifest["rejected"] == {"not cp1252": 3}
    rows = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["b.txt", "c.jsonl", "d.tar"]
    assert rows[2]["where"].startswith("e.jsonl: after byte")
