"""Object storage by its own protocols: stand-ins for the servers of S3 and of Google, asked by the real clients."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from conftest import Command
from layouts import texts, tokens_of, write_json_lines

from mmrec.core import urls
from mmrec.data.remote_store import open_remote_tokens
from mmrec.data.store import open_tokens

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

DRIVERS = {"s3": "s3fs", "gs": "gcsfs"}


class Storage(http.server.ThreadingHTTPServer):
    """One bucket, named "bucket": a dictionary of its files."""

    files: dict[str, bytes]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Storage
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        google = re.fullmatch(r"(?:/download)?/storage/v1/b/bucket/o(?:/(.*))?", url.path)
        name = unquote(google[1] or "" if google else url.path.removeprefix("/bucket").lstrip("/"))
        inside = {key: data for key, data in self.server.files.items() if key.startswith(asked.get("prefix", ""))}
        if not name:
            self.answer(200, self.listed(inside, asked.get("delimiter"), bool(google)))
        elif name not in self.server.files:
            self.answer(404, b"{}")
        elif google and asked.get("alt") != "media":
            self.answer(200, json.dumps(self.entry(name)).encode())
        else:
            data = self.server.files[name]
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(span[1]), min(int(span[2]), len(data) - 1)) if span else (0, len(data) - 1)
            self.answer(206 if span else 200, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")

    do_HEAD = do_GET

    def entry(self, name: str) -> dict[str, str]:
        size = str(len(self.server.files[name]))
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "size": size, "generation": "1"}

    def listed(self, files: dict[str, bytes], delimiter: str | None, google: bool) -> bytes:
        assert delimiter in (None, "", "/")
        if google:
            return json.dumps({"items": [self.entry(name) for name in files]}).encode()
        rows = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, data in files.items()
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()

    def answer(self, code: int, data: bytes, span: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json" if data[:1] == b"{" else "application/octet-stream")
        if span is not None:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the bucket, which both clients find at the stand-in."""
    with Storage(("127.0.0.1", 0), Handler) as storage:
        storage.files = {}
        address = f"http://127.0.0.1:{storage.server_address[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "test")
        thread = threading.Thread(target=storage.serve_forever, daemon=True)
        thread.start()
        yield storage.files
        storage.shutdown()
        thread.join()


@pytest.mark.parametrize("scheme", DRIVERS)
def test_texts_and_tokens_in_a_bucket(mmrec: Command, tmp_path: Path, bucket: dict[str, bytes], scheme: str) -> None:
    pytest.importorskip(DRIVERS[scheme])
    for k in range(2):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl.gz", texts()[k::2])
        bucket[f"in/{k}.jsonl.gz"] = (tmp_path / "in" / f"{k}.jsonl.gz").read_bytes()
    assert mmrec("prepare", "in", "--output_dir", "here", "--workers", "1") == 0
    assert mmrec("prepare", f"{scheme}://bucket/in", "--output_dir", "there", "--workers", "1") == 0
    here, there = tokens_of(Path("here")), tokens_of(Path("there"))
    assert [here[name] for name in ("train.bin", "val.bin")] == [there[name] for name in ("train.bin", "val.bin")]

    bucket |= {f"tokens/{path.name}": path.read_bytes() for path in Path("here").iterdir()}
    remote = open_remote_tokens(f"{scheme}://bucket/tokens", 1 << 20)
    np.testing.assert_array_equal(remote.train[0 : len(remote.train)], open_tokens(Path("here")).train)


@pytest.mark.parametrize(("scheme", "driver"), DRIVERS.items())
def test_without_the_client_the_extra_is_named(
    mmrec: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scheme: str,
    driver: str,
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    assert mmrec("prepare", f"{scheme}://bucket/in") == 2
    assert capsys.readouterr().err == f"mmrec: error: this needs the package {driver}; pip install 'mmrec[cloud]'\n"


def test_without_credentials_google_is_asked_as_anyone(
    bucket: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcsfs")
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    def missing() -> None:
        raise DefaultCredentialsError("none")

    urls._google.cache_clear()
    monkeypatch.setattr(google.auth, "default", missing)
    bucket["a.txt"] = b"text"
    fs, path = urls.filesystem("gs://bucket/a.txt")
    assert fs.credentials.method == "anon"
    assert fs.cat_file(path) == b"text"
    urls._google.cache_clear()
