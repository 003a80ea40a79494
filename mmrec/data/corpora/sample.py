"""A text that is on every machine: the language topics of Python's own help."""

from __future__ import annotations

from collections.abc import Iterator

from mmrec.data.corpora.base import Corpus, Document, Options


class Sample(Corpus):
    """CPython's ``pydoc_data.topics``: about 0.5 MB of English and code, which differs between versions."""

    title = "the topics of Python's own help (pydoc_data)"

    def __init__(self, options: Options) -> None:
        pass

    def documents(self) -> Iterator[Document]:
        from pydoc_data.topics import topics

        yield Document("pydoc_data.topics", "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n")
