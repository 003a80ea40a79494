"""Proposals for the encoding of a text, each with a sample of what it would read."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

MOST = 4
"""Encodings that are proposed."""
NEARBY = 1 << 16
"""Bytes before and after the place in question that are looked at."""
BEFORE, AFTER = 12, 20
"""Characters of a sample before and after its place."""
LOOKED_AT = 2000
"""Places, of bytes that are not ASCII, where a sample may be taken."""
USUAL = ("cp1252", "cp1251", "koi8_r", "gb18030", "cp932", "euc_jis_2004", "cp949", "big5", "cp1250", "cp1254")
"""Named before others that fit as well: texts are seldom in those."""


def is_ascii_taken_for_wide(data: bytes, encoding: str) -> bool:
    """Whether ``data`` is plain ASCII and ``encoding`` of two or four bytes a unit, as UTF-16 is.

    Pairs of ASCII letters are letters of UTF-16, too, of other scripts; but a text in UTF-16 has line ends, spaces or
    a byte order mark, which are not ASCII.
    """
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    return wide and data.isascii() and b"\0" not in data


def propose_encodings(data: bytes, place: int) -> str:
    """Return the encodings that ``data`` may be in, the likeliest first, with what each reads.

    That is shown around byte ``place``, or after it, where they differ most. Every one that is named decodes all of
    ``data``. An empty string where none is likely.
    """
    texts: dict[str, str] = {}
    for name in _candidates(data, place):
        try:
            texts[name] = data.decode(name)
        except UnicodeError:
            continue
    place = _telling(data, place, [*texts][:MOST])
    samples: list[str] = []
    for name, text in texts.items():
        at = len(data[:place].decode(name, errors="ignore"))
        sample = " ".join(text[max(0, at - BEFORE) : at + AFTER].split())
        if sample and sample.isprintable():
            samples.append(f"{name.replace('_', '-')} reads {sample!r}")
    return ", ".join(samples[:MOST])


def _telling(data: bytes, place: int, names: Sequence[str]) -> int:
    """Return the first place, from ``place`` on, around which the likeliest of the encodings ``names`` differ.

    Turkish by Windows is all but Western European by Windows: many samples of it read the same by either.
    """
    places = [at for at in range(place, min(len(data), place + NEARBY)) if data[at] >= 0x80][:LOOKED_AT]

    def readings(at: int) -> list[int]:
        samples = [data[max(0, at - BEFORE) : at + AFTER].decode(name, "replace") for name in names]
        return [len({*samples[:count]}) for count in range(2, len(samples) + 1)]

    return max(places, key=readings, default=place) if len(names) > 1 else place


def _candidates(data: bytes, place: int) -> list[str]:
    """Return names of encodings, the likeliest first."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first begins as that of UTF-16
        return ["utf-32"]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ["utf-16"]
    if b"\0" in data:  # of text, only these hold zeros
        return _wide(data[: 2 * NEARBY])
    from charset_normalizer import from_bytes

    start = data.rfind(b"\n", 0, max(0, place - NEARBY)) + 1
    nearby = data[start : place + NEARBY]
    found = [match.encoding for match in from_bytes(nearby)] or [
        match.encoding for match in from_bytes(nearby, threshold=0.6)
    ]
    # The detector cannot tell some of them apart by the text; what is usual goes first.
    return sorted(found[: 2 * MOST], key=lambda name: (name not in USUAL, found.index(name)))


def _wide(data: bytes) -> list[str]:
    """Return which of UTF-16 and UTF-32, without a byte order mark, the begin of a text may be in."""
    zeros = [data[place::4].count(0) / max(1, len(data) // 4) for place in range(4)]
    if min(zeros[:2]) > 0.9:  # nearly all characters are below U+10000
        return ["utf-32-be"]
    if min(zeros[2:]) > 0.9:
        return ["utf-32-le"]
    # Those of letters below U+0100 are at one of two places.
    shares = {"utf-16-be": zeros[0] + zeros[2], "utf-16-le": zeros[1] + zeros[3]}
    return [name for name, share in shares.items() if share > 0.6]
