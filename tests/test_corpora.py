"""The corpora: what they yield, and what they say where they cannot."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from conftest import SHAKESPEARE

from mmrec.core.errors import UserError
from mmrec.data.corpora import CORPORA, get_corpus, tiny_shakespeare
from mmrec.data.corpora.base import Options

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not at hand")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads go to a folder of the test; no proxy and no mirror of the environment takes part."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
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
    assert texts("file", Options(files=[path], encoding="latin-1")) == {"mine.text": "café"}


def test_several_files(tmp_path: Path) -> None:
    """In the order in which they are named; empty ones are left out, unless all are."""
    paths = [tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "blank.txt"]
    for path, content in zip(paths, ("B", "A", " \n"), strict=True):
        path.write_text(content)
    corpus = get_corpus("file", Options(files=paths))
    assert [document.text for document in corpus.documents()] == ["B", "A"]
    assert corpus.skipped == [(str(paths[2]), "empty")]
    with pytest.raises(UserError, match="all empty"):
        texts("file", Options(files=paths[2:] * 2))


@pytest.mark.parametrize("name", ["file", "directory"])
def test_missing_option_is_named(name: str) -> None:
    with pytest.raises(UserError, match="needs --input_"):
        get_corpus(name, Options())


def test_directory(tmp_path: Path) -> None:
    contents = {"b.txt": "B", "a/z.txt": "Z", "note.MD": "M", "page.html": "P", "empty.txt": ""}
    contents |= {".hidden.txt": "H", ".git/x.txt": "X"}
    for name, text in (contents | {"blank.txt": " \n"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "missing")
    corpus = get_corpus("directory", Options(input_dir=tmp_path))
    read = [(document.name, document.text) for document in corpus.documents()]
    assert read == [("a/z.txt", "Z"), ("b.txt", "B"), ("note.MD", "M")]
    assert corpus.skipped == [
        (".git", "hidden"),
        (".hidden.txt", "hidden"),
        ("a/loop", "a link to a folder"),
        ("blank.txt", "empty"),
        ("broken.txt", "no file"),
        ("empty.txt", "empty"),
        ("page.html", "no format that is read"),
    ]
    assert texts("directory", Options(input_dir=tmp_path, glob="*.md")) == {"note.MD": "M"}


@pytest.mark.parametrize("option", ["--input_dir=mine", "mine"])
def test_what_was_prepared_among_the_texts_is_not_read_again(
    option: str, mmrec: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its copies would be trained on twice, and validate themselves."""
    if option == "mine":
        pytest.importorskip("datatrove")
    Path("mine/old.work").mkdir(parents=True)
    Path("mine/old.work/plan.json").write_text("{}")
    for name in "abcde":
        Path(f"mine/{name}.txt").write_text(f"the text of {name} " * 40)
    given = (option, "--tokenizer=bytes", "--val_split=0.3")
    assert mmrec("prepare", *given, "--output_dir=mine/tokens") == 0
    assert mmrec("prepare", *given, "--output_dir=mine/tokens") == 0
    assert "mine/tokens: already prepared, nothing to do" in capsys.readouterr().out
    assert mmrec("prepare", *given, "--output_dir=other") == 0
    for part in ("train.bin", "val.bin"):
        assert Path("other", part).read_bytes() == Path("mine/tokens", part).read_bytes()
    rows = [json.loads(row) for row in Path("other/sources.jsonl").read_text().splitlines()]
    skipped = {Path(row["file"]).name: row["skipped"] for row in rows if row.get("skipped", "hidden") != "hidden"}
    assert skipped == dict.fromkeys(("old.work", "tokens"), "what mmrec prepare wrote")
    source = given[0].replace("mine", "other")
    assert mmrec("prepare", source, "--output_dir=again") == 2
    assert "other: is what mmrec prepare wrote, not texts" in capsys.readouterr().err
    assert mmrec("prepare", "", "--output_dir=again") == 2
    assert "given as an empty text" in capsys.readouterr().err
    assert not Path("again").exists()


def test_directory_without_text_says_what_was_searched(tmp_path: Path) -> None:
    (tmp_path / "note.html").write_text("M")
    with pytest.raises(UserError, match=r"no text in files named \*\.txt, .*1 no format that is read\): note\.html"):
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


def test_download_without_end_is_given_up(
    served: tuple[Path, str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_shakespeare, "MAX_BYTES", 100_000)
    (served[0] / "input.txt").write_text("x" * 300_000)
    with pytest.raises(UserError, match="more than 100,000 bytes"):
        texts("tiny_shakespeare", Options(mirror=f"{served[1]}/input.txt"))
    assert files(own_cache) == []


@pytest.mark.parametrize(
    ("address", "target", "refused"),
    [
        ("https://a.example/x", "http://b.example/x", True),
        ("https://a.example/x", "https://b.example/x", False),
        ("https://a.example/x", "/y", False),
        ("http://127.0.0.1/x", "http://127.0.0.1/y", False),
    ],
)
def test_https_stays_https(address: str, target: str, refused: bool) -> None:
    response = requests.Response()
    response.url = address
    response.headers["Location"] = target
    if refused:
        with pytest.raises(UserError, match=r"a\.example points to an address without https"):
            tiny_shakespeare._stay_secure(response)
    else:
        tiny_shakespeare._stay_secure(response)


def test_cache_that_cannot_be_written(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(UserError, match=r"mmrec: cannot be written \(Not a directory\).*XDG_CACHE_HOME"):
        texts("tiny_shakespeare", Options(mirror=served[1]))


@pytest.mark.parametrize("mirror", ["http://[::1", "https://host:99999"])
def test_mirror_that_is_no_url(mirror: str) -> None:
    with pytest.raises(UserError, match="is not a URL"):
        texts("tiny_shakespeare", Options(mirror=mirror))


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


def test_offline_behind_a_proxy(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "127.0.0.1:1")
    assert "no connection to 127.0.0.1" in offline_error(own_cache)


def test_offline_with_a_resolver_that_hangs(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_shakespeare, "CONNECT_SECONDS", 0.2)

    def hang(*args: object, **options: object) -> list[object]:
        time.sleep(2)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
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
