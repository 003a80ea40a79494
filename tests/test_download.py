"""Downloads that break off: they go on from their last byte, and nothing wrong gets the file's name."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from layouts import split_at_separator, texts, write_parquet

from mmrec.core.errors import UserError
from mmrec.core.urls import filesystem, only_https
from mmrec.data.pipeline import download as module
from mmrec.data.pipeline import sources
from mmrec.data.pipeline.download import download
from mmrec.data.store import open_tokens

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

CONTENT = bytes(range(256)) * 40_000


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; breaks off after ``most`` bytes of an answer but the first, where that is set.

    Attributes:
        accepts: what it says of ranges: "bytes"; "none", or a lie, and it sends no part of the file but the whole.
    """

    most: int | None = None
    accepts = "bytes"
    requests: list[tuple[int, int]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.send_header("Accept-Ranges", "none" if self.server.accepts == "none" else "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "") if self.server.accepts == "bytes" else ""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        first, last = (int(found[1]), int(found[2])) if found else (0, len(CONTENT) - 1)
        last = min(last, len(CONTENT) - 1)
        self.server.requests.append((first, last))
        data = CONTENT[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(data)))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.end_headers()
        breaks = self.server.most is not None and len(self.server.requests) > 1
        with suppress(ConnectionError):  # of a client that wants no whole file
            self.wfile.write(data[: self.server.most] if breaks else data)
        self.close_connection = breaks

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PATIENCE", 0.001)
    with Server(("127.0.0.1", 0), Handler) as served:
        served.requests = []
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/file.bin"


def test_a_file_arrives(server: Server, tmp_path: Path) -> None:
    assert download([url(server)], tmp_path / "in") == [str(tmp_path / "in" / "file.bin")]
    assert (tmp_path / "in" / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["file.bin"]
    before = len(server.requests)
    download([url(server)], tmp_path / "in")
    assert len(server.requests) == before  # nothing is fetched twice


def test_https_is_not_left_for_a_plain_connection(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_on(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", url(server))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    sends_on = type("SendsOn", (Handler,), {"do_HEAD": send_on, "do_GET": send_on})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), sends_on) as first:
        threading.Thread(target=first.serve_forever, daemon=True).start()
        begin = f"http://127.0.0.1:{first.server_address[1]}/file.bin"
        download([begin], tmp_path)  # what was plain from the start may stay so
        (tmp_path / "file.bin").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(module, "filesystem", lambda url: fsspec.core.url_to_fs(url, **only_https()))
            with pytest.raises(UserError, match=r"sends on to http://.*, which is not https"):
                download([begin], tmp_path)
        first.shutdown()
    assert not (tmp_path / "file.bin").exists()
    assert filesystem("https://127.0.0.1/file.bin")[0].client_kwargs["trace_configs"]


def test_bytes_rate_and_time_left_are_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:100])
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    download([url(server)], tmp_path)
    assert re.search(r"downloading: 100%.* 10\.2M/10\.2M \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", terminal.getvalue())
    assert f"1 files to fetch into {tmp_path}: 10,239,900 bytes left of 10,240,000" in capsys.readouterr().out
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_it_goes_on_from_the_last_byte(server: Server, tmp_path: Path) -> None:
    server.most = 100
    with pytest.raises(UserError, match=r"of 10,240,000 bytes are kept, try again later"):
        download([url(server)], tmp_path)
    kept = (tmp_path / "file.bin.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not (tmp_path / "file.bin").exists()
    server.most = None
    server.requests.clear()
    download([url(server)], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert min(first for first, _ in server.requests) >= kept


@pytest.mark.parametrize("accepts", ["none", "lie"])
def test_a_server_that_sends_only_the_whole(server: Server, tmp_path: Path, accepts: str) -> None:
    server.accepts = accepts
    part = tmp_path / "file.bin.part"
    part.write_bytes(b"x" * 5_000_000)
    server.most = 6_000_000
    server.requests.append((0, 0))
    with pytest.raises(UserError, match=r"of 10,240,000 bytes are kept, try again later"):
        download([url(server)], tmp_path)
    assert 0 < part.stat().st_size < len(CONTENT)
    assert CONTENT.startswith(part.read_bytes())
    server.most = None
    download([url(server)], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_wrong_sha256_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a.bin", CONTENT)
    monkeypatch.setattr(module, "_sha256", lambda info: hashlib.sha256(b"other").hexdigest())
    with pytest.raises(UserError, match="another sha256"):
        download(["memory://bucket/a.bin"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "_sha256", lambda info: hashlib.sha256(CONTENT).hexdigest())
    download(["memory://bucket/a.bin"], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_too_little_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/b.bin", CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"10,240,000 bytes are to be fetched, and there is room for 1,000"):
        download(["memory://bucket/b.bin"], tmp_path)


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be reached: .*(Connect call failed|refused)"):
        download(["http://127.0.0.1:9/file.bin"], tmp_path / "in")
    assert not (tmp_path / "in").exists()


HUB = """
import http.server, json, re, sys
from pathlib import Path
from hashlib import sha256
paths = [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
files = {str(path.relative_to(sys.argv[1])): path.read_bytes() for path in paths}

spoiled = set()  # what was sent wrongly, the first time that it was asked for

def entry(name):
    data = files[name]
    lfs = {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return {"type": "file", "oid": "b" * 40, "size": len(data), "path": name, "lfs": lfs}

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, data, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/o/n/tree/main"):
            return self.answer(200, json.dumps([entry(name) for name in files]).encode())
        if path in ("/api/datasets/o/n", "/api/datasets/o/n/revision/main"):
            return self.answer(200, json.dumps({"_id": "1", "id": "o/n", "sha": "f" * 40, "siblings": []}).encode())
        name = path.removeprefix("/datasets/o/n/resolve/main/")
        data = files.get(name)
        if data is None:
            return self.answer(404, b"{}")
        wanted = re.match(r"bytes=(\\d+)-(\\d*)", self.headers.get("Range") or "bytes=0-")
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        span = f"bytes {first}-{last}/{len(data)}"
        if first < last and name not in spoiled:
            spoiled.add(name)
            data = bytes(len(data))
        return self.answer(206, data[first : last + 1], ETag='"x"', X_Repo_Commit="f" * 40, Content_Range=span)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.mark.slow
def test_a_set_of_the_hub(tmp_path: Path) -> None:
    """A stand-in for Hugging Face's server: the files are listed, fetched, checked and prepared."""
    pytest.importorskip("datatrove")
    pieces = texts()
    write_parquet(tmp_path / "hub" / "de" / "train-00000-of-00001.parquet", list(pieces[:60]))
    write_parquet(tmp_path / "hub" / "en" / "train-00000-of-00001.parquet", list(pieces[60:]))
    (tmp_path / "hub" / "README.md").write_text("about the set")
    with subprocess.Popen(
        [sys.executable, "-c", HUB, str(tmp_path / "hub")], stdout=subprocess.PIPE, text=True
    ) as hub:
        assert hub.stdout is not None
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.stdout.readline().strip()}"}
        command = [sys.executable, "-m", "mmrec", "prepare", "hf:o/n", "--workers", "1"]
        runs = [
            subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            for _ in range(3)
        ]
        hub.terminate()
    for wrong in runs[:2]:
        assert wrong.returncode == 2
        assert "another sha256 than the server says; it was deleted, try again" in wrong.stderr
    done = runs[2]
    assert done.returncode == 0, done.stderr
    tokens = open_tokens(tmp_path / "data" / "n")
    assert sorted(split_at_separator(tokens, "train") + split_at_separator(tokens, "val")) == sorted(pieces)


def test_no_file_is_made_of_two_versions(tmp_path: Path) -> None:
    """The server has another by the time that the download goes on."""
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/c.bin", CONTENT)
    (tmp_path / "c.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "c.bin.part.version").write_text("size 5000")
    download(["memory://bucket/c.bin"], tmp_path)
    assert (tmp_path / "c.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["c.bin"]


def test_the_version_is_noted_while_a_file_is_not_whole(server: Server, tmp_path: Path) -> None:
    server.most = 100
    with pytest.raises(UserError, match="try again later"):
        download([url(server)], tmp_path)
    assert (tmp_path / "file.bin.part.version").read_text() == f"size {len(CONTENT)}"


def test_an_empty_file_arrives(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/empty.bin", b"")
    download(["memory://bucket/empty.bin"], tmp_path)
    assert (tmp_path / "empty.bin").read_bytes() == b""


def test_a_folder_of_a_web_server_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose file system gives whole URLs, unlike the others."""
    monkeypatch.setattr(sources, "_remote", lambda path, ask: ["http://host/a.txt"])
    assert sources._files_below("http://host/") == ["http://host/a.txt"]
