"""Files elsewhere: on object storage and on web servers, through fsspec."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mmrec.core.errors import UserError
from mmrec.core.optional import optional_import

T = TypeVar("T")

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Modules through which fsspec reaches object storage."""
BY_PROXY = {"trust_env": True}
"""Option of aiohttp's sessions: a proxy that the environment names is asked, which they do not by themselves."""
PAUSES = (1, 2, 4, 8, 16, 30, 30, 30)
"""Seconds between the attempts of :func:`retry`."""


class Unreachable(UserError):
    """Something elsewhere cannot be reached, and may be later."""


def is_url(path: Path | str) -> bool:
    """Whether ``path`` is elsewhere, as s3://bucket/file."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the URL's path in it.

    Raises:
        UserError: its package is missing, or fsspec has none for such URLs.
    """
    scheme = url.partition("://")[0]
    driver = DRIVERS.get(scheme)
    if driver is not None:
        optional_import(driver)
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        options = only_https() if scheme == "https" else {"client_kwargs": dict(BY_PROXY)}
    elif driver == "gcsfs":
        options = _google()
    with translate_errors(url):
        fs, path = optional_import("fsspec.core").url_to_fs(url, **options)
    return fs, str(path)


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Turn what a file system raises into one line that names the URL.

    Raises:
        Unreachable: it may be reached later.
        UserError: there is no such file, or it is for others.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every file system raises errors of its own
        for_good = isinstance(error, FileNotFoundError | PermissionError | ValueError | ImportError)
        raise (UserError if for_good else Unreachable)(f"{url}: cannot be reached: {why(error)}") from None


def why(error: Exception) -> str:
    """Return what an error of a file system says, in a line.

    That of a web server's answer has no more in it than the URL; what it is for has the reason.
    """
    if isinstance(error.__cause__, UserError):  # ours, in one that the file system made of it
        error = error.__cause__
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and str(error).startswith("http"):
        status = getattr(cause, "status", None)
        return f"the server answers {status} {getattr(cause, 'message', '')}".rstrip() if status else why(cause)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def retry(ask: Callable[[], T]) -> T:
    """Return what ``ask`` does, asked again for two minutes while it raises :class:`Unreachable`."""
    for pause in PAUSES:
        try:
            return ask()
        except Unreachable as error:
            print(f"mmrec: {error}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)
    return ask()


@cache
def _google() -> dict[str, Any]:
    """Return options of gcsfs: where there are no credentials it asks as anyone.

    By itself it would first try, again and again, a server that only Google's machines have.
    """
    try:
        optional_import("google.auth").default()
    except optional_import("google.auth.exceptions").DefaultCredentialsError:
        return {"token": "anon", "session_kwargs": dict(BY_PROXY)}
    return {"session_kwargs": dict(BY_PROXY)}


def only_https() -> dict[str, Any]:
    """Return options of fsspec's HTTP file system with which it does not follow a server to a plain connection."""
    aiohttp = optional_import("aiohttp")

    async def check(session: Any, context: Any, redirect: Any) -> None:
        target = str(redirect.response.headers.get("Location", ""))
        if target.lower().startswith("http:"):
            raise UserError(f"{redirect.url}: sends on to {target}, which is not https")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    return {"client_kwargs": {"trace_configs": [trace], **BY_PROXY}}
