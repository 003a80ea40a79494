"""From the texts that were named to token folders: what is read how, and by which tokenizers."""

from __future__ import annotations

import codecs
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mmrec.core.errors import UserError
from mmrec.core.urls import is_url
from mmrec.data.corpora import CORPORA, get_corpus
from mmrec.data.corpora.base import Options
from mmrec.data.options import PrepareOptions
from mmrec.data.pipeline.download import download
from mmrec.data.pipeline.formats import is_packed, reader_of
from mmrec.data.prepare import prepare
from mmrec.data.resolve import SMALL_BYTES, ResolvedSource, are_small_texts, resolve_source
from mmrec.data.store import FolderTakenError, TokenFolder, read_manifest, written_by_prepare
from mmrec.planning.plan import LARGEST_ALPHABET
from mmrec.tokenizers import TOKENIZERS

PLAIN = 1.2
"""Bytes of a character up to which a text is read byte by byte: what the model reads later may hold any character."""
PREPARED = 2_500_000
"""Bytes of a large text that are prepared in a second: its tokenizer is trained first."""
FEW_WORDS, ENOUGH_WORDS = 100_000, 1_000_000
"""Bytes of a text from which on words and parts of words, byte-level BPE, may be better tokens than characters, and
from which on they are: between the two that depends on how long it is trained on."""
MANY_WORDS = 3_000_000
"""Bytes of a text from which on more of them are better."""
VOCABULARY, LARGE_VOCABULARY = 1024, 4096
"""Tokens of a BPE below that and above; the latter also for more than :data:`LARGEST_ALPHABET` characters."""

BY_WORDS = "-bpe"
"""Ends the name of the token folder, by BPE, of a corpus that has a name, as the configs mean the one without it, by
the corpus's own tokenizer; and of a text that may be read by characters, too."""


def prepare_texts(
    texts: Sequence[str],
    tokenizer: str | None,
    minutes: float | None = None,
    encoding: str = "utf-8",
    glob: str | None = None,
    is_begun: Callable[[Path], bool] = lambda _: False,
    run: str | None = None,
    is_new: bool = True,
) -> list[TokenFolder]:
    """Prepare what ``texts`` name, by ``tokenizer`` or by those that may suit it, and return the token folders.

    Args:
        texts: name of a corpus, or files, folders and URLs.
        tokenizer: a kind of tokenizer or the path of one; None for those that may suit the text.
        minutes: of all that is done; None for no limit.
        encoding: of your own files.
        glob: names of the files that count in a folder; those of text files if None.
        is_begun: whether a training has begun on the token folder of that path: then it is the only one.
        run: names the token folder where that of the text's own name holds another text.
        is_new: whether there is no run of that name yet; another text's is no place for this one.

    Raises:
        UserError: they name nothing that can be read, or so much that the time would be over; or the folders that
            they would be prepared into hold something else.
    """
    if {"-", "/dev/stdin"} & {*texts}:
        raise UserError(
            "a text is read more than once in training: write the standard input to a file, and name that"
        )
    texts = [*map(_fetched, texts)]
    options = _options(texts, encoding, glob)
    places = [options.output_dir]
    if run is not None:
        beside = Path("data", run)
        begun = is_begun(beside) or is_begun(beside.with_name(f"{run}{BY_WORDS}"))
        places = [beside] if begun else [*places, beside] if is_new else places
    taken: FolderTakenError | None = None
    for place in places:
        try:
            return _prepare_as(replace(options, output_dir=place), texts[0] in CORPORA, tokenizer, minutes, is_begun)
        except FolderTakenError as error:
            taken = taken or error
    assert taken is not None
    raise UserError(
        f"{taken.folder}: {taken.what}; give another --run to train beside it, or move that folder and its run away"
    )


def _prepare_as(
    options: PrepareOptions,
    has_name: bool,
    tokenizer: str | None,
    minutes: float | None,
    is_begun: Callable[[Path], bool],
) -> list[TokenFolder]:
    """Prepare what ``options`` mean; FolderTakenError where the token folder is that of another text."""
    source = resolve_source(options)
    if minutes is not None:
        _check_time(source, minutes)
    if tokenizer is None:
        wanted = _suitable(source, has_name, options, is_begun)
    else:
        before, vocabulary = _asked_before(source.output_dir), None
        if before is not None and tokenizer == before[0]:
            vocabulary = before[1]
        elif tokenizer == "bpe":
            vocabulary = choose_tokenizers(source, options.encoding, options.glob)[-1][1] or VOCABULARY
        wanted = [(source.output_dir, tokenizer, vocabulary)]
    prepared = [
        _prepared(replace(options, output_dir=folder, tokenizer=name, vocab_size=size))
        for folder, name, size in reversed(wanted)
    ]
    return prepared[::-1]


def _fetched(text: str) -> str:
    """Return ``text``, or its file where it is the URL of a plain text: that is fetched once, and kept."""
    if not is_url(text):
        return text
    name = text.rpartition("/")[2]
    named = re.split("[?#]", text)[0].rpartition("/")[2] if text.startswith("http") else name  # without a query
    if is_packed(named) or not (".txt." in named or reader_of(named) == "text"):
        return text
    # Two URLs may end alike.
    folder = Path("data", f"{named.partition('.')[0]}.download", hashlib.sha256(text.encode()).hexdigest()[:8])
    file = folder / name
    if not file.exists() or not file.stat().st_size:
        download([text], folder)
    with file.open("rb") as content:
        begins = content.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if begins.startswith((b"<!doctype html", b"<html")):
        file.unlink()
        raise UserError(f"{text}: the server sends a web page, not a plain text; give the URL of the text itself")
    return str(file)


def _prepared(options: PrepareOptions) -> TokenFolder:
    folder = prepare(options)
    assert folder is not None  # Slurm alone returns none
    return folder


def _suitable(
    source: ResolvedSource, has_name: bool, options: PrepareOptions, is_begun: Callable[[Path], bool]
) -> list[tuple[Path, str, int | None]]:
    """Return the token folders that may suit a text, each with its tokenizer and the size of its vocabulary.

    What was prepared keeps its tokenizer, and a training that has begun its token folder. Of two that are to be
    compared the last, by words, is prepared first: where it is alone, the command was stopped before the other was.
    """
    plain = source.output_dir
    by_words = plain.with_name(f"{plain.name}{BY_WORDS}")
    asked = {folder: before for folder in (plain, by_words) if (before := _asked_before(folder)) is not None}
    begun = [folder for folder in asked if is_begun(folder)][:1]
    if asked and (begun or has_name or plain in asked):
        chosen = begun or ([by_words] if has_name and by_words in asked else [*asked])
        return [(folder, *asked[folder]) for folder in chosen]
    choices = choose_tokenizers(source, options.encoding, options.glob)
    beside = has_name or len(choices) > 1
    return [(by_words if beside and name == "bpe" else plain, name, size) for name, size in choices]


def _check_time(source: ResolvedSource, minutes: float) -> None:
    """Raise UserError where preparing a large text that is not prepared yet takes more than half of the time."""
    if not source.is_large or written_by_prepare(source.output_dir):
        return
    takes = sum(map(_local_size, source.paths)) / PREPARED / 60
    if takes > minutes / 2:
        least = math.ceil(2 * takes)
        raise UserError(
            f"{source.paths[0]}: takes {takes:.0f} minutes to be prepared; give --minutes {least} or more"
        )


def _local_size(path: str) -> int:
    """Return the bytes of a file, or of the files in a folder; 0 where they are elsewhere."""
    place = Path(path)
    files = [place] if place.is_file() else place.rglob("*") if place.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())


def _options(texts: Sequence[str], encoding: str, glob: str | None) -> PrepareOptions:
    """Return the options of ``mmrec prepare`` that mean ``texts``: what is small is held in memory."""
    first, *rest = texts
    folder = Path(first)
    if rest and first not in CORPORA:
        place = Path("data", f"{folder.stem}-and-{len(rest)}-more")
        if are_small_texts(texts):
            return PrepareOptions("file", texts, output_dir=place, encoding=encoding, glob=glob)
        return PrepareOptions(first, rest, output_dir=place, encoding=encoding, glob=glob)
    if rest or first in CORPORA or not folder.is_dir():
        return PrepareOptions(first, rest, encoding=encoding, glob=glob)
    if _local_size(first) >= SMALL_BYTES:
        return PrepareOptions(first, encoding=encoding, glob=glob)
    name = folder.resolve().name or "texts"
    return PrepareOptions(input_dir=folder, output_dir=Path("data", name), encoding=encoding, glob=glob)


def _asked_before(folder: Path) -> tuple[str, int | None] | None:
    """Return the tokenizer and the size of the vocabulary that a token folder was asked for; None if there is none.

    A text that was prepared stays as it is, also where another tokenizer would be chosen by now.
    """
    manifest = read_manifest(folder) or {}
    name = manifest.get("tokenizer", {}).get("name")
    request = manifest.get("request", {})
    if name not in TOKENIZERS or request.get("tokenizer", name) != name:  # the path of a tokenizer was given
        return None
    if "tokenizer" in request:
        return name, request["vocab_size"]
    return name, manifest["tokenizer"]["vocab_size"] if name == "bpe" else None  # a large corpus has a digest


def choose_tokenizers(
    source: ResolvedSource, encoding: str = "utf-8", glob: str | None = None
) -> list[tuple[str, int | None]]:
    """Return the tokenizers that may suit a text, each with the size of its vocabulary where that can be chosen.

    Byte-level BPE of a text of many words. Of a shorter one bytes where most characters are one, else characters, or
    BPE where there are too many of them; between the two, from :data:`FEW_WORDS` to :data:`ENOUGH_WORDS`, both.
    """
    if source.is_large:
        sizes = [_local_size(path) for path in source.paths if "://" not in path]
        known = bool(sizes) and len(sizes) == len(source.paths)
        return _by_size(sum(sizes) if known else SMALL_BYTES, "bytes")
    characters: set[str] = set()
    length = size = 0
    corpus = get_corpus(source.corpus or "", Options([*map(Path, source.paths)], source.input_dir, encoding, glob))
    for document in corpus.documents():
        characters |= {*document.text}
        length += len(document.text)
        size += len(document.text.encode("utf-8"))
    if len(characters) > LARGEST_ALPHABET:
        return [("bpe", LARGE_VOCABULARY)]
    return _by_size(size, "bytes" if size <= PLAIN * length else "characters")


def _by_size(size: int, of_short: str) -> list[tuple[str, int | None]]:
    """Return the tokenizers for a text of so many bytes, of few different characters."""
    if size < FEW_WORDS:
        return [(of_short, None)]
    by_words = ("bpe", VOCABULARY if size < MANY_WORDS else LARGE_VOCABULARY)
    return [by_words] if size >= ENOUGH_WORDS else [(of_short, None), by_words]


def check_tokenizer(name: str | None) -> None:
    """Raise UserError where ``name`` is neither a kind of tokenizer nor a path."""
    if name is not None and name not in TOKENIZERS and not Path(name).exists():
        raise UserError(f"--tokenizer is {name!r}; it must be {', '.join(TOKENIZERS)}, or the path of one")
