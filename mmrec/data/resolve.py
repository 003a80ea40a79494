"""From what was typed to the one source that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmrec.core.errors import UserError, nearest
from mmrec.core.urls import is_url
from mmrec.data.corpora import CORPORA
from mmrec.data.corpora.large import HUB, LARGE_CORPORA
from mmrec.data.options import PrepareOptions
from mmrec.data.pipeline.formats import is_packed, reader_of
from mmrec.data.store import written_by_prepare

SMALL_BYTES = 10**9
"""Text files that are smaller together are held in memory as a whole."""


@dataclass(frozen=True)
class ResolvedSource:
    """What is to be prepared, and where it goes.

    Attributes:
        corpus: name of the corpus; None where only files and folders are named.
        paths: the files of the corpus "file", or the files and folders of a large one; none where it is to be
            downloaded.
        input_dir: of the corpus "directory".
        output_dir: the token folder.
        is_large: whether it is read shard by shard, instead of held in memory.
    """

    corpus: str | None
    paths: tuple[str, ...]
    input_dir: Path | None
    output_dir: Path
    is_large: bool


def resolve_source(options: PrepareOptions) -> ResolvedSource:
    """Return the source that the options name.

    Raises:
        UserError: they name none, an unknown one, or options that are not for it.
    """
    name, paths = options.corpus, tuple(options.paths)
    if "" in (name, *paths):
        raise UserError("a corpus, file or folder is given as an empty text; name one")
    for folder in (*paths, options.input_dir):
        _refuse_token_folder(folder)
    implied = "file" if options.input_file else "directory" if options.input_dir else None
    if implied is None and name is not None and name not in CORPORA:
        is_named = name in LARGE_CORPORA or name.startswith(HUB)
        name, paths = (name, paths) if is_named else (None, (_existing(name), *paths))
        if name is None and len(paths) == 1 and are_small_texts(paths):
            return _small(options, ResolvedSource("file", paths, None, Path("data", Path(paths[0]).stem), False))
        folder = Path("data") / _folder_name(name or paths[0])
        return _large(options, ResolvedSource(name, paths, None, folder, True))
    if name is None and implied is None:
        raise UserError("name a corpus, for example tiny_shakespeare, or give --input_file or --input_dir")
    if implied is not None and name not in (None, implied):
        raise UserError(f"--input_{'file' if implied == 'file' else 'dir'} is not for the corpus {name!r}")
    name = name or implied or ""
    if paths and name != "file":
        raise UserError(f"{paths[0]}: the corpus {name!r} takes no files of yours")
    if elsewhere := next(filter(is_url, paths), None):
        raise UserError(
            f"{elsewhere}: is a URL; the corpus 'file' reads files that are here, mmrec train fetches one"
        )
    if options.input_file is not None:
        paths = (str(options.input_file), *paths)
    return _small(options, ResolvedSource(name, paths, options.input_dir, Path("data", name), False))


def _refuse_token_folder(source: str | Path | None) -> None:
    """Raise UserError where a source is a token folder: its texts would be split anew, validation among training."""
    if source and not is_url(str(source)) and Path(source).is_dir() and written_by_prepare(Path(source)):
        raise UserError(f"{source}: is what mmrec prepare wrote, not texts; mmrec fit reads it by --data.data_dir")


def _small(options: PrepareOptions, source: ResolvedSource) -> ResolvedSource:
    """Return a source that is held in memory; UserError where an option is for large corpora alone."""
    if given := options.changed("text_field", "drop_duplicates", "executor", "slurm"):
        raise UserError(
            f"--{given[0]} is for large corpora, and for folders and files of many documents that are named without "
            f"--input_file or --input_dir: mmrec prepare FOLDER"
        )
    known = {"encoding": ("file", "directory"), "glob": ("directory",)}
    for option in options.changed("encoding", "glob"):
        if source.corpus not in known[option]:
            kinds = "your own texts" if option == "encoding" else "a folder"
            raise UserError(f"--{option} is for {kinds}, not for {source.corpus!r}")
    return _written_to(options, source)


def _large(options: PrepareOptions, source: ResolvedSource) -> ResolvedSource:
    """Return a source that is read shard by shard; UserError where an option is for small corpora alone."""
    if options.verify:
        return _written_to(options, source)
    if options.glob is not None:
        raise UserError("--glob is for a folder of texts that are held in memory; name the files that count")
    if options.changed("encoding") and source.corpus is not None:
        raise UserError(f"--encoding is for your own texts, not for {source.corpus!r}")
    if options.mirror is not None:
        raise UserError("--mirror is for the small corpora; for a large one, name the files that you have")
    return _written_to(options, source)


def _written_to(options: PrepareOptions, source: ResolvedSource) -> ResolvedSource:
    return source if options.output_dir is None else replace(source, output_dir=options.output_dir)


def _existing(path: str) -> str:
    """Return ``path``, given where a corpus may stand; UserError where it is neither."""
    if "://" in path or Path(path).exists():
        _refuse_token_folder(path)
        return path
    names = [*CORPORA, *LARGE_CORPORA]
    raise UserError(
        f"unknown corpus {path!r}, and no such file or folder; known: {', '.join(names)}, {HUB}OWNER/NAME"
        f"{nearest(path, names)}"
    )


def are_small_texts(paths: Sequence[str]) -> bool:
    """Whether all paths are text files, which are held in memory as a whole."""
    return all(map(_is_text, paths)) and sum(Path(path).stat().st_size for path in paths) < SMALL_BYTES


def _is_text(path: str) -> bool:
    """Whether a path is a file that is neither packed nor of a format of its own: a text, as it was named."""
    return Path(path).is_file() and not is_packed(path) and reader_of(path) in ("text", None)


def _folder_name(path: str) -> str:
    """Return a folder's name for a corpus or a path."""
    return path.removeprefix(HUB).rstrip("/").rpartition("/")[2].partition(".")[0] or "corpus"
