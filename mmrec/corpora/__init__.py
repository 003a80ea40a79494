"""The corpora by name. To add one: a file with a :class:`Corpus`, and a line here."""

from __future__ import annotations

from mmrec.corpora.base import Corpus, Options
from mmrec.corpora.directory import Directory
from mmrec.corpora.file import File
from mmrec.corpora.sample import Sample
from mmrec.corpora.shakespeare_plays import ShakespearePlays
from mmrec.corpora.tiny_shakespeare import TinyShakespeare
from mmrec.errors import UserError, nearest

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
