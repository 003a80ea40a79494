"""Tiny Shakespeare (Karpathy 2015): one megabyte of plays, the text that small models are compared on."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mmrec.core.errors import UserError, one_line
from mmrec.core.text_files import decode_text
from mmrec.data.corpora.base import Corpus, Document, Options

FILE = "tinyshakespeare.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_BYTES = 4 * 1_115_394
"""A download is given up here: four times what it should be is another file, or has no end."""
MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt",
)
CONNECT_SECONDS = 2.5
"""For each mirror: with three of them, a machine without a network is told so within 10 seconds."""


class TinyShakespeare(Corpus):
    """Downloaded once, from the first mirror that answers, and checked against its sha256."""

    default_tokenizer = "characters"
    title = "Tiny Shakespeare"

    def __init__(self, options: Options) -> None:
        self.mirror = options.mirror or os.environ.get("MMREC_MIRROR") or None

    def documents(self) -> Iterator[Document]:
        path = self._from_mirror(self.mirror) if self.mirror else self._download()
        yield Document(FILE, decode_text(path.read_bytes(), path, "utf-8"))

    def _from_mirror(self, mirror: str) -> Path:
        try:
            parts = urlsplit(mirror)
            parts.port  # noqa: B018 (it is read for its ValueError)
        except ValueError as error:
            raise UserError(f"{mirror}: is not a URL ({error}); name a folder or URL that holds {FILE}") from None
        if parts.scheme in ("http", "https"):
            base = mirror.rstrip("/")
            return self._first([base] if base.endswith(".txt") else [f"{base}/{FILE}", f"{base}/input.txt"])
        folder = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(mirror)
        for path in (folder, folder / FILE, folder / "input.txt"):
            if path.is_file():
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if found != SHA256:
                    raise UserError(f"{path}: is not Tiny Shakespeare: sha256 {found}, expected {SHA256}")
                return path
        raise UserError(f"{mirror}: no {FILE} there; name a folder or URL that holds it")

    def _download(self) -> Path:
        return self._first(MIRRORS)

    def _first(self, urls: tuple[str, ...] | list[str]) -> Path:
        """Return the file from the first of ``urls`` that has it, or from the cache."""
        import pooch

        pooch.get_logger().setLevel("WARNING")  # the progress bar says enough
        cache = pooch.os_cache("mmrec")
        reasons: list[str] = []
        for url in urls:
            try:
                return Path(
                    pooch.retrieve(
                        url,
                        known_hash=f"sha256:{SHA256}",
                        fname=FILE,
                        path=cache,
                        downloader=_fetch,
                    )
                )
            except UserError as error:
                reasons.append(str(error))
            except ValueError as error:  # pooch's word for a wrong hash; it has removed what it fetched
                raise UserError(f"{url}: is not Tiny Shakespeare: {one_line(error)}") from None
            except OSError as error:  # what the network does wrong is a UserError of _fetch
                raise UserError(
                    f"{cache}: cannot be written ({error.strerror or one_line(error)}); name another folder in "
                    f"XDG_CACHE_HOME, or put {FILE} into a folder and give --mirror FOLDER"
                ) from None
        raise UserError(
            f"Tiny Shakespeare could not be downloaded ({reasons[0]}); without a network put {FILE} into a "
            f"folder and give --mirror FOLDER"
        )


def _fetch(url: str, output_file: str, _pooch: object) -> None:
    """Download ``url`` for pooch; UserError says why it could not be."""
    import pooch
    import requests

    # Behind a proxy, names need not resolve here: it is the proxy that must be there.
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    peer = urlsplit(requests.utils.prepend_scheme_if_needed(proxy, "http") if proxy else url)
    _reach(peer.hostname or "", peer.port or (443 if peer.scheme == "https" else 80))
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        timeout=(CONNECT_SECONDS, 10 * CONNECT_SECONDS),
        allow_redirects=True,
        hooks={"response": _stay_secure},
    )
    with _Bounded(output_file, "wb") as output:
        try:
            downloader(url, output, None)
        except requests.RequestException as error:
            raise UserError(_reason(error, url)) from None


def _stay_secure(response: Any, **_options: object) -> None:
    """Refuse to be sent from https to http; requests calls this before it follows."""
    target = response.headers.get("location", "")
    if response.url.startswith("https:") and target.lower().startswith("http:"):
        raise UserError(f"{urlsplit(response.url).hostname} points to an address without https")


class _Bounded(io.FileIO):
    """A file that takes no more than :data:`MAX_BYTES`."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MAX_BYTES:
            raise UserError(f"more than {MAX_BYTES:,} bytes were sent; that is not Tiny Shakespeare")
        return super().write(data)


def _reason(error: Exception, url: str) -> str:
    import requests

    host = urlsplit(url).hostname
    match error:
        case requests.HTTPError() if error.response is not None:
            return f"{host} answered {error.response.status_code}"
        case requests.exceptions.SSLError():
            return f"the certificate of {host} is not accepted"
        case requests.Timeout():
            return f"{host} does not answer"
        case requests.ConnectionError():
            return f"no connection to {host}"
    return one_line(error)[:120]


def _reach(host: str, port: int) -> None:
    """Connect to ``host`` once; UserError after :data:`CONNECT_SECONDS`, however many addresses it has.

    The time-out of a request counts for each address in turn, and that of the resolver cannot be set. All is
    tried at once in threads that are left behind when the time is up.
    """
    results: queue.SimpleQueue[OSError | list[tuple[Any, ...]] | None] = queue.SimpleQueue()
    deadline = time.monotonic() + CONNECT_SECONDS

    def look_up() -> None:
        try:
            results.put([info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except OSError as error:
            results.put(error)

    def connect(address: tuple[Any, ...]) -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
            results.put(None)
        except OSError as error:
            results.put(error)

    def outcome() -> OSError | list[tuple[Any, ...]] | None:
        return results.get(timeout=max(0.0, deadline - time.monotonic()))

    threading.Thread(target=look_up, daemon=True).start()
    try:
        addresses = outcome()
    except queue.Empty:
        addresses = None
    if not isinstance(addresses, list):
        raise UserError(f"the name {host} could not be resolved")
    for address in addresses:
        threading.Thread(target=connect, args=(address,), daemon=True).start()
    try:
        if all(outcome() is not None for _ in addresses):
            raise UserError(f"no connection to {host}")
    except queue.Empty:
        raise UserError(f"{host} does not answer") from None
