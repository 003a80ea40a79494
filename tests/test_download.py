"""Downloads that break off: they go on from their last byte, and nothing wrong gets the file's name."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrec.errors import UserError
from mmrec.large import download as module
from mmrec.large.download import download

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

CONTENT = bytes(range(256)) * 40_000


class Server(http.server.ThreadingHTTPServer):
    """Serves one file by ranges; breaks off after ``most`` bytes of an answer, where that is set."""

    most: int | None = None
    requests: list[tuple[int, int]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2])) if found else (0, len(CONTENT) - 1)
        last = min(last, len(CONTENT) - 1)
        self.server.requests.append((first, last))
        data = CONTENT[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.end_headers()
        if self.server.most is not None and len(self.server.requests) > 1:
            self.wfile.write(data[: self.server.most])
            self.close_connection = True
        else:
            self.wfile.write(data)

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
    with pytest.raises(UserError, match="cannot be reached"):
        download(["http://127.0.0.1:9/file.bin"], tmp_path)
