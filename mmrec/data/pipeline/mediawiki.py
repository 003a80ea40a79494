"""MediaWiki's XML dumps: articles without their markup."""

from __future__ import annotations

import bz2
import io
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

from mmrec.core.optional import optional_import
from mmrec.data.pipeline.records import Record, Rejected, decompressed, naming, open_raw, suffixes
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.wikitext import HIDDEN_NAMESPACES, NAMES, clean, is_redirect

ARTICLES = "0"
"""The namespace of articles; talk, files, templates and the rest have others."""
PART_BYTES = 1 << 25
"""Compressed bytes that a shard of a multistream dump has at least."""
LONGEST_PAGE = 1 << 21
"""Characters of the longest page that is read. MediaWiki itself takes no longer one, and the parser of the markup was
seen to hold 400 bytes for each: more would take a worker over its bound."""
PIECE = 1 << 16
"""Bytes of XML that are read at once."""


def read_mediawiki(shard: Shard, field: str) -> Iterator[Record]:
    """The articles of a dump, or of some streams of a multistream dump, without redirects and other pages."""
    optional_import("mwparserfromhell")
    site = Site()
    with open_raw(shard.path) as raw, naming(shard.path):
        whole = shard.first == 0 and shard.last is None
        if whole:
            with decompressed(raw, shard.path) as file:
                yield from _articles(file, site)
        else:
            _read_head(raw, site)
            raw.seek(shard.first)
            data = raw.read() if shard.last is None else raw.read(shard.last - shard.first)
            if shard.last is not None and len(data) < shard.last - shard.first:
                raise EOFError("ends before the last stream that its index names")
            with decompressed(io.BytesIO(data), shard.path) as file:
                yield from _articles(_Rooted(file, shard.last is not None), site)


class Site:
    """What a dump says of its wiki: the names of the namespaces whose links show no text, in lower case."""

    def __init__(self) -> None:
        self.hidden: set[str] = set(NAMES)


def _read_head(raw: IO[bytes], site: Site) -> None:
    """Read the first stream of a multistream dump into ``site``: it holds what is said of the site, and no page."""
    head = bz2.BZ2Decompressor()
    parser = ElementTree.XMLParser(target=_Pages(site))
    while not head.eof and (data := raw.read(PIECE)):
        parser.feed(head.decompress(data, PIECE))


def _articles(file: IO[bytes] | _Rooted, site: Site) -> Iterator[Record]:
    for title, text in pages(file, site):
        if isinstance(text, Rejected) or text is None:
            yield text or Rejected("no text", title)
            continue
        if is_redirect(text):
            yield Rejected("redirect", title)
            continue
        try:
            yield clean(text, site.hidden)
        except Exception as error:  # the parser's own errors, and the recursion of markup nested too deep
            yield Rejected(f"wikitext cannot be parsed ({type(error).__name__})", title)


def pages(file: IO[bytes] | _Rooted, site: Site) -> Iterator[tuple[str, str | Rejected | None]]:
    """Yield the title and the markup of every article that is not a redirect, of its last revision; fill ``site``.

    The markup of a page over :data:`LONGEST_PAGE` is dropped as it is read. Expat itself bounds what entities may
    expand to.
    """
    found = _Pages(site)
    parser = ElementTree.XMLParser(target=found)
    while data := file.read(PIECE):
        parser.feed(data)
        yield from found.take()
    parser.close()
    yield from found.take()


class _Pages:
    """What an XML parser calls, tag by tag: it holds one page, and no more of that than is read."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.is_hidden = False
        self.path: list[str] = []
        self.fields: dict[str, list[str]] = {}
        self.field: list[str] | None = None
        self.size = 0
        self.done: list[tuple[str, str | Rejected | None]] = []

    def take(self) -> list[tuple[str, str | Rejected | None]]:
        """Return the pages that ended since the last call."""
        done, self.done = self.done, []
        return done

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition("}")[2]
        self.path.append(name)
        match self.path[-3:]:
            case [*_, "page"]:
                self.fields = {}
            case [*_, "page", "title" | "ns" | "redirect"] | ["page", "revision", "text"]:
                self.field = self.fields[name] = []  # of several revisions the last one counts
                self.size = 0
            case [*_, "namespaces", "namespace"]:
                self.field, self.size = [], 0
                self.is_hidden = attributes.get("key") in HIDDEN_NAMESPACES

    def data(self, text: str) -> None:
        if self.field is not None and self.size <= LONGEST_PAGE:
            self.size += len(text)
            self.field.append(text)

    def end(self, tag: str) -> None:
        name = self.path.pop()
        if name == "namespace" and self.is_hidden:
            self.site.hidden.add(" ".join("".join(self.field or ()).replace("_", " ").split()).lower())
        self.field = None
        if name == "page" and "redirect" not in self.fields:
            title, text = ("".join(self.fields.get(name, [])) for name in ("title", "text"))
            if "".join(self.fields.get("ns", [ARTICLES])).strip() == ARTICLES:
                long = len(text) > LONGEST_PAGE
                self.done.append((title or "?", Rejected("longer than 2 MiB", title) if long else text or None))

    def close(self) -> None:
        """The document has ended."""


class _Rooted:
    """Pages from the middle of a dump, between the tags that a parser wants around them.

    Args:
        file: pages.
        close: whether the closing tag is missing; the last stream of a dump has it.
    """

    def __init__(self, file: IO[bytes], close: bool) -> None:
        self.parts: list[IO[bytes]] = [io.BytesIO(b"<mediawiki>"), file]
        self.parts += [io.BytesIO(b"</mediawiki>")] if close else []

    def read(self, size: int = -1) -> bytes:
        while self.parts:
            data = self.parts[0].read(size)
            if data:
                return data
            self.parts.pop(0)
        return b""


def split_dump(path: str, index: str, part_bytes: int = PART_BYTES) -> list[Shard]:
    """Return the shards of a multistream dump, cut at streams that ``index`` ("offset:page:title" a line) names.

    The first stream, before the first offset, holds what is said of the site and no page.
    """
    shards: list[Shard] = []
    offsets: list[int] = []
    with open_raw(index) as raw, naming(index), decompressed(raw, index) as file:
        for line in file:
            start = line.split(b":", 1)[0]
            if not start.isdigit():
                raise EOFError(f"{line[:40]!r} is not 'offset:page:title'")
            if not offsets or int(start) != offsets[-1]:
                offsets.append(int(start))
    first = 0
    for offset in offsets:
        if not first:
            first = offset
        elif offset - first >= part_bytes:
            shards.append(Shard("mediawiki", path, first, offset))
            first = offset
    return [*shards, Shard("mediawiki", path, first, None)] if first else [Shard("mediawiki", path)]


def is_multistream(path: str) -> bool:
    """Whether a file's name says that its bz2 streams stand each for itself."""
    return "multistream" in path.rpartition("/")[2] and "index" not in path and suffixes(path)[-1:] == ["bz2"]
