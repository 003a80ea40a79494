"""The corpora by name. To add one: a file with a :class:`Corpus`, and a line here."""

from __future__ import annotations

from mmrec.core.errors import UserError, nearest
from mmrec.data.corpora.base import Corpus, Options
from mmrec.data.corpora.directory import Directory
from mmrec.data.corpora.file import File
from mmrec.data.corpora.sample import Sample
from mmrec.data.corpora.shakespeare_plays import ShakespearePlays
from mmrec.data.corpora.tiny_shakespeare import TinyShakespeare

CORPORA: dict[str, type[Corpus]] = {
    "tiny_shakespeare": TinyShakespeare,
    "shakespeare_plays": ShakespearePlays,
    "sample": Sample,
    "file": File,
    "directory": Directory,
}


def get_corpus(name: str, options: Options) -> Corpus:
    """Return the corpus ``name``; UserError where there is none, or where it lacks an option that it needs."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}{nearest(name, CORPORA)}")
    return CORPORA[name](options)
