"""mmrec train: what it takes for a text, and what it refuses."""

from __future__ import annotations

import http.server
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command
from helpers import last

from mmrec.data.store import read_manifest
from mmrec.planning.source import _options

pytestmark = pytest.mark.usefixtures("quick_trial")
SMALL = ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.max_steps=2"]


@pytest.fixture(autouse=True)
def plain_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is held in memory needs nothing of mmrec[prepare]."""
    monkeypatch.setitem(sys.modules, "datatrove", None)


def test_several_files_are_trained_on_together(mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the shell gives them by *.txt, an empty one among them."""
    for number in range(3):
        Path(f"{number}.txt").write_text(text[number * 3000 : (number + 1) * 3000], encoding="utf-8")
    Path("3.txt").touch()
    names = [f"{number}.txt" for number in range(4)]
    assert mmrec("train", *names, *SMALL) == 0
    assert "skipped     1 files (1 empty): 3.txt" in capsys.readouterr().out
    manifest = read_manifest(Path("data/0-and-3-more"))
    assert manifest is not None
    assert manifest["corpus"]["documents"] == 3
    assert mmrec("train", *names, "--minutes=10", *SMALL, "--plan") == 0  # goes on
    assert "longer      " in capsys.readouterr().out
    assert mmrec("train", "0.txt", *SMALL) == 0  # another text
    assert last("0")["global_step"] == last("0-and-3-more")["global_step"] == 2


def test_a_file_that_is_named_twice_is_read_once(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its copy would be what validates."""
    Path("a.txt").write_text(text[:6000], encoding="utf-8")
    Path("b.txt").symlink_to("a.txt")
    assert mmrec("train", "a.txt", "./a.txt", "b.txt", *SMALL) == 0
    assert "skipped     2 files (2 named before): a.txt, b.txt" in capsys.readouterr().out
    manifest = read_manifest(Path("data/a-and-2-more"))
    assert manifest is not None
    assert manifest["corpus"]["documents"] == 1
    assert sum(manifest["tokens"].values()) == 6000


@pytest.mark.parametrize("name", ["thesis.tex", "code.PY", "notes.rst", "letter", "gz", ".diary"])
def test_a_file_that_is_named_is_read_as_text(mmrec: Command, text: str, name: str) -> None:
    Path(name).write_text(text[:6000], encoding="utf-8")
    assert mmrec("train", name, "--run=it", *SMALL) == 0
    assert last("it")["global_step"] == 2


@pytest.fixture
def proxy(text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a proxy was asked for, which alone knows the hosts, and sends 6,000 letters whatever is asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = f"\n<!DOCTYPE html><html>{text}</html>"
            content = (page if "page" in self.path else text[:6000]).encode()
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_text_of_a_url_is_fetched_once_through_the_proxy_of_the_environment(
    mmrec: Command, proxy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", "http://books.invalid/1342.txt.utf-8", *SMALL) == 0
    assert last("1342.txt")["global_step"] == 2
    assert {*proxy} == {"http://books.invalid/1342.txt.utf-8"}
    before = len(proxy)
    assert mmrec("train", "http://books.invalid/1342.txt.utf-8", *SMALL) == 0  # goes on
    assert len(proxy) == before
    capsys.readouterr()
    assert mmrec("train", "http://books.invalid/missing.txt", *SMALL) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "http://books.invalid/missing.txt: cannot be reached: the server answers 404" in said[0]
    assert not Path("data/missing.download").exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("proxy")
def test_the_text_of_a_url_with_a_query_is_read_and_a_page_is_refused(
    mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("train", "http://books.invalid/novel.txt?raw=1#begin", *SMALL) == 0
    assert last("novel")["global_step"] == 2
    for _ in range(2):
        capsys.readouterr()
        assert mmrec("train", "http://books.invalid/page.txt", *SMALL) == 2
        assert "page.txt: the server sends a web page, not a plain text" in capsys.readouterr().err
    assert not Path("data/page").exists()
    assert mmrec("prepare", "file", "http://books.invalid/novel.txt") == 2
    assert "http://books.invalid/novel.txt: is a URL" in capsys.readouterr().err


def test_a_glob_says_which_files_of_a_folder_count(
    mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("source/inner").mkdir(parents=True)
    for number, name in enumerate(("one.py", "inner/two.py", "read.me")):
        Path("source", name).write_text(text[number * 3000 : (number + 1) * 3000], encoding="utf-8")
    assert mmrec("train", "source", *SMALL) == 2
    assert "no text in files named *.txt" in capsys.readouterr().err
    assert mmrec("train", "source", "--glob=**/*.py", *SMALL) == 2
    assert "it is for names of files, in all subfolders" in capsys.readouterr().err
    assert mmrec("train", "source", "--glob=*.py", *SMALL) == 0
    manifest = read_manifest(Path("data/source"))
    assert manifest is not None
    assert manifest["corpus"]["documents"] == 2
    assert mmrec("train", "source/one.py", "--glob=*.py", *SMALL) == 2
    assert "--glob is for a folder" in capsys.readouterr().err


def test_a_folder_of_texts_is_trained_on_as_a_whole(mmrec: Command, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(text[number * 3000 : (number + 1) * 3000], encoding="utf-8")
    assert mmrec("train", folder, *SMALL) == 0
    assert last("letters")["global_step"] == 2


def test_odd_texts_are_trained_on(mmrec: Command, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """2 kB, a line that is repeated, and 10,000 tiny files."""
    Path("two.txt").write_text(text[:2000], encoding="utf-8")
    Path("line.txt").write_text("All work and no play makes a dull model.\n" * 500, encoding="utf-8")
    Path("notes").mkdir()
    for number in range(10_000):
        Path(f"notes/{number}.txt").write_text(f"note {number}\n", encoding="utf-8")
    for name, run in (("two.txt", "two"), ("line.txt", "line"), ("notes", "notes")):
        assert mmrec("train", name, *SMALL) == 0
        assert last(run)["global_step"] == 2
        said = capsys.readouterr().out
        assert "It writes:" in said
        assert "nan" not in said


def test_texts_that_cannot_be_trained_on_are_refused(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Random bytes, nothing, and 5 GB in ten minutes."""
    Path("random.txt").write_bytes(random.Random(0).randbytes(20_000))
    Path("empty.txt").touch()
    with open("big.txt", "wb") as file:
        file.truncate(5 * 10**9)
    refusals = {
        "random.txt": "is binary",
        "empty.txt": "is empty",
        "big.txt": "33 minutes to be prepared; give --minutes 67 or more",
    }
    for name, word in refusals.items():
        assert mmrec("train", name) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert word in said[0]
    assert not Path("data").exists()


def test_a_file_and_a_folder_have_a_place_of_their_own(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text(text, encoding="utf-8")
    Path("folder").mkdir()
    places = {_options(texts, "utf-8", None).output_dir for texts in (["in.txt", "folder"], ["in.txt", "in.txt"])}
    assert places == {Path("data/in-and-1-more")}
    assert _options(["in.txt"], "utf-8", None).output_dir != Path("data/in-and-1-more")
