"""Who may ask, and from where: the key, and what keeps other web pages in the same browser out."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mmrec.serve.protocol import ApiError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 30.0
"""A request that takes longer to arrive is given up."""


def error_response(error: ApiError) -> JSONResponse:
    """Return ``error`` as an answer."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


class Authentication:
    """Refuses a request before its body is read.

    A page of another site can make its reader's browser ask a server on loopback. Its requests carry that site's
    ``Origin``; or, where the site's name was made to point at loopback (DNS rebinding), its ``Host``.

    Args:
        app: what answers the others.
        key: that requests must carry; none if None. The page itself is given without: it asks for the key.
        loopback: whether the server can be reached from this machine alone.
    """

    def __init__(self, app: ASGIApp, key: str | None, loopback: bool) -> None:
        self._app, self._loopback = app, loopback
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""

        async def send_safely(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-store"
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send_safely)
        else:
            await self._app(scope, receive, send_safely)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._loopback and _place(f"//{host}")[0] not in LOOPBACK_NAMES:
            raise ApiError(403, f"this server is asked as {host[:80]!a}, but is there for localhost only")
        if origin is not None and _place(origin) != _place(f"{origin.partition(':')[0]}://{host}"):
            raise ApiError(403, f"a page of {origin[:80]!a} may not ask this server")
        if self._expected is not None and path != "/":
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                raise ApiError(401, "give the server's key: 'Authorization: Bearer KEY'", code="invalid_api_key")


def _place(url: str) -> tuple[str | None, int | None]:
    """Return host and port of an address; (None, None) where it is none."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None, None


async def read_body(request: Request, kind: str, most: int) -> bytes:
    """Return the body of a request, at most ``most`` bytes of the media type ``kind``.

    A form of another site can send neither JSON nor binary data without the browser asking us first.

    Raises:
        ApiError: it is of another type, too long, or does not arrive.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise ApiError(415, f"the content type is {given[:80]!a}; it must be {kind}")
    too_long = ApiError(413, f"the request has more than {most:,} bytes")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)
