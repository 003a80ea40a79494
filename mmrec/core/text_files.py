"""Reading a person's text file: strictly, and saying where it is not what it should be."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mmrec.core.encodings import is_ascii_taken_for_wide, propose_encodings
from mmrec.core.errors import UserError, nearest

COMMON_ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "ascii", "koi8-r", "gb18030", "shift_jis")
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
"""How packed files begin, and by what."""
AS_IT_IS = ", or give it to mmrec train or mmrec prepare as it is, without --input_file"
ENDS = {"gzip": "gz", "bzip2": "bz2", "xz": "xz", "zstd": "zst"}
"""How the names of packed files end that are read as they are."""
DOCUMENTS = {
    b"%PDF-": "a PDF",
    b"{\\rtf": "rich text",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a document of an office program",
}
"""How documents begin that are no plain text, and what they are."""
PACKED_DOCUMENTS = ("docx", "odt", "epub", "pptx", "xlsx", "ods", "pages")
"""How the names of documents end that are packed by zip."""


def files_below(
    folder: str | Path,
    skip: Callable[[Path, str], object] = lambda path, reason: None,
    reason_to_skip: Callable[[Path], str] = lambda folder: "",
) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, in no order; what is hidden, and linked folders, are left out.

    Args:
        folder: where they are.
        skip: called with each file or folder that is left out, and the reason.
        reason_to_skip: says of a folder below why it is left out; an empty string where it is not.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in sorted(folders):
            path = Path(parent, name)
            reason = "hidden" if name.startswith(".") else "a link to a folder" if path.is_symlink() else ""
            if reason := reason or reason_to_skip(path):
                skip(path, reason)
                folders.remove(name)
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path
            else:
                skip(path, "hidden" if name.startswith(".") else "no file")


def is_blank(path: Path) -> bool:
    """Whether a file has nothing but white space in it; UserError where it cannot be read."""
    try:
        size = path.stat().st_size
        # White space alone is a matter of a few bytes; a longer file is left to read_text.
        return size == 0 or (size < 1024 and not path.read_bytes().strip())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of ``path`` with its line ends as they are; a byte order mark is left out.

    Raises:
        UserError: the file is missing, not readable, empty or binary, the encoding is unknown, or the bytes
            are not in it; the message says where.
    """
    check_encoding(encoding)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give it as --input_dir") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return decode_text(data, path, encoding)


def check_encoding(encoding: str) -> None:
    """Raise UserError where there is no such text encoding."""
    try:
        known = codecs.lookup(encoding)
    except (LookupError, ValueError):
        known = None
    # Some codecs ("hex", "rot13") do not make text of bytes.
    if known is None or not known._is_text_encoding:
        hint = nearest(encoding, COMMON_ENCODINGS) or "; for example --encoding utf-8 or cp1252"
        raise UserError(f"unknown encoding {encoding!r}{hint}")


def decode_text(data: bytes, path: Path, encoding: str) -> str:
    """Return ``data``, the content of ``path``, as text; raises as :func:`read_text`."""
    if not data:
        raise UserError(f"{path}: is empty")
    packer = next((name for begin, name in PACKED.items() if data.startswith(begin)), None)
    suffix = path.suffix.lower().removeprefix(".")
    document = next((name for begin, name in DOCUMENTS.items() if data.startswith(begin)), None)
    if document is not None or (packer == "zip" and suffix in PACKED_DOCUMENTS):
        what = document or f"a document ({suffix})"
        raise UserError(f"{path}: is {what}, not plain text; save it as plain text in the program that shows it")
    if packer is not None:
        end = ENDS.get(packer)
        # By the name it is told how a file is read.
        advice = "" if end is None else AS_IT_IS if suffix == end else f", or let its name end in .{end}"
        raise UserError(f"{path}: is packed by {packer}; unpack it{advice}")
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") and b"\0" in data:
        where = data.index(b"\0")
        proposed = _proposed(data, where)
        other = f"in another encoding: {proposed}" if proposed else "damaged"
        raise UserError(f"{path}: is binary, not text (a zero byte at {where:,}), or {other}")
    if is_ascii_taken_for_wide(data, encoding):
        raise UserError(f"{path}: is plain ASCII, not {encoding}; leave out --encoding {encoding}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: is not {encoding} at byte {error.start:,} (line {line:,}){_advice(data, error.start)}"
        ) from None
    except UnicodeError as error:  # what the rarer codecs raise, without a place
        raise UserError(f"{path}: is not {encoding} ({error}); name its encoding, for example utf-8") from None
    if not is_unicode(text):
        raise UserError(f"{path}: as {encoding}, it holds halves of characters; name its encoding, for example utf-8")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise UserError(f"{path}: holds nothing but white space")
    return text


def _proposed(data: bytes, place: int) -> str:
    """Return advice that names likely encodings, or an empty string."""
    proposed = propose_encodings(data, place)
    return proposed and f"choose the one that reads right and name it by --encoding: {proposed}"


def _advice(data: bytes, place: int) -> str:
    proposed = _proposed(data, place)
    return f"; {proposed}" if proposed else ", and no other encoding makes text of it"


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: half a surrogate pair, which Python lets through, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
