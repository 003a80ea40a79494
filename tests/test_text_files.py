"""A text file is read exactly, or refused with a line that says where it is wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from pathlib import Path

import pytest

from mmrec.core.errors import UserError
from mmrec.core.text_files import read_text


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_line_ends_and_characters_stay_as_they_are(tmp_path: Path) -> None:
    text = "a\r\nb\rc\n\n d\u00e9\U0001f600"
    assert read_text(write(tmp_path / "f", text.encode())) == text


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "f", b"\xef\xbb\xbfhello")) == "hello"
    assert read_text(write(tmp_path / "g", "hello".encode("utf-16")), "utf-16") == "hello"


def test_another_encoding_is_read_when_named(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "f", "d\u00e9j\u00e0".encode("latin-1")), "latin-1") == "d\u00e9j\u00e0"


@pytest.mark.parametrize(
    ("data", "encoding", "says"),
    [
        (b"", "utf-8", "is empty"),
        (b" \n\t\n", "utf-8", "white space"),
        (b"\x7fELF\x00\x00", "utf-8", "is binary"),
        (
            gzip.compress(b"text", mtime=0),
            "latin-1",
            "is packed by gzip; unpack it, or let its name end in .gz",
        ),
        (bz2.compress(b"text"), "utf-8", "is packed by bzip2; unpack it, or let its name end in .bz2"),
        (lzma.compress(b"text"), "utf-8", "is packed by xz; unpack it, or"),
        (b"PK\3\4" + bytes(26), "utf-8", "is packed by zip; unpack it$"),
        (b"%PDF-1.7\n1 0 obj\n", "utf-8", "is a PDF, not plain text; save it as plain text"),
        (rb"{\rtf1\ansi text}", "utf-8", "is rich text, not plain text"),
        (b"one\ntwo\nd\xe9j\xe0 vu", "utf-8", r"byte 9 \(line 3\); .*cp1252 reads 'one two d\u00e9j\u00e0 vu'"),
        (b"text", "utf-9", "unknown encoding 'utf-9'; did you mean 'utf-8'"),
        (b"text", "hex", "unknown encoding"),
        (b"text", "zzz", "for example --encoding utf-8"),
        (b"\xef\xbb\xbfa\x00", "utf-8-sig", "is binary"),
        (b"text", "undefined", "is not undefined"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, data: bytes, encoding: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_text(write(tmp_path / "f", data), encoding)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who may run the tests, can read everything
    with pytest.raises(UserError, match=r"f: cannot be read: Permission denied"):
        read_text(write(tmp_path / "f", b"text"))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(UserError, match="--input_dir"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "encoding", "proposed"),
    [
        ("It\u2019s a \u201criver\u201d \u2014 na\u00efve.", "cp1252", "cp1252"),
        ("\u6cb3\u8fb9\u6709\u4e00\u5757\u7070\u8272\u7684\u77f3\u5934\u3002", "gb2312", "gb18030"),
        ("\u5ddd\u306e\u77f3\u3002", "shift_jis", "cp932"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?", "koi8-r", "koi8-r"),
        ("\u0130stanbul'da g\u00fcne\u015fli bir g\u00fcn.", "cp1254", "cp1254"),
        ("The river is quiet.", "utf-16-le", "utf-16-le"),
        ("The river is quiet.", "utf-16-be", "utf-16-be"),
        ("The river is quiet.", "utf-16", "utf-16"),
        ("The river is quiet.", "utf-32-le", "utf-32-le"),
        ("\u6cb3\u8fb9\u6709\u4e00\u5757\u77f3\u5934\u3002", "utf-32-be", "utf-32-be"),
        ("The river is quiet.", "utf-32", "utf-32"),
    ],
)
def test_likely_encodings_are_proposed_with_what_they_read(
    tmp_path: Path, text: str, encoding: str, proposed: str
) -> None:
    path = write(tmp_path / "f", f"{text}\n".encode(encoding) * (1 if encoding in ("utf-16", "utf-32") else 20))
    with pytest.raises(UserError) as error:
        read_text(path)
    message = str(error.value)
    assert "latin" not in message
    advised = message.partition("--encoding: ")[2].split(", ")
    names = [advice.partition(" reads ")[0] for advice in advised if " reads " in advice]
    assert proposed in names
    (sample,) = {advice.partition(" reads ")[2] for advice in advised if advice.startswith(f"{proposed} reads ")}
    assert sample[1:9] in " ".join(f"{text} {text}".split())
    for name in names:
        assert read_text(path, name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "UTF_16BE", "utf-32"])
def test_ascii_is_not_read_as_letters_of_another_script(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(UserError, match=f"is plain ASCII, not {encoding}; leave out"):
        read_text(write(tmp_path / "f", b"The river is quiet at night.\r\n" * 4), encoding)


@pytest.mark.parametrize("data", [b"text with one\0 zero\n" * 5, bytes(range(256)) * 4])
def test_what_is_binary_is_given_no_advice_that_cannot_fail(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"is binary, not text \(a zero byte at [\d,]+\), or damaged$"):
        read_text(write(tmp_path / "f", data))


def test_what_is_packed_is_refused_by_what_its_name_says(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unpack it, or give it to mmrec train or mmrec prepare as it is"):
        read_text(write(tmp_path / "f.txt.gz", gzip.compress(b"text")))
    with pytest.raises(UserError, match=r"is a document \(docx\), not plain text"):
        read_text(write(tmp_path / "f.docx", b"PK\3\4" + bytes(26)))


@pytest.mark.parametrize("encoding", ["cp1254", "cp857"])
def test_the_samples_of_two_encodings_differ(tmp_path: Path, encoding: str) -> None:
    """Turkish begins with letters that Western European has, too, at the same places."""
    text = "\u00c7ok g\u00fczel bir g\u00fcn, de\u011fil mi? \u015e\u00f6yle bir a\u011fa\u00e7 alt\u0131nda.\n" * 100
    with pytest.raises(UserError) as caught:
        read_text(write(tmp_path / "f", text.encode(encoding)))
    samples = re.findall(r"(\S+) reads '([^']*)'", str(caught.value))
    right = dict(samples)[encoding]
    assert right in text
    assert [name for name, sample in samples if sample == right] == [encoding]
