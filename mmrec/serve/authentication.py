"""Authentication by a key, and protection from other web pages in the same browser."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mmrec.core.errors import UserError
from mmrec.serve.protocol import ApiError

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
"""Of a host, as browsers send it."""
ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[\w-]+(\.[\w-]+)*|\[[0-9a-f:.]+\])(?P<port>:[0-9]+)?")


def as_sent(host: str) -> str:
    """Return the name of a host as browsers send it: in lower case, letters beyond ASCII by IDNA (RFC 3490)."""
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:  # no name: it is refused
        return host


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    Args:
        key: that every request must carry; none if None.
        loopback: whether the server can be reached from this machine alone.
        hosts: names of the server, beside localhost and the addresses of loopback: a request for another is refused
            where only this machine can reach it.
        allowed_origins: of pages on other servers that may send requests, as https://example.org.

    Raises:
        UserError: a name or an origin is none.
    """

    key: str | None = None
    loopback: bool = True
    hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not NAME.fullmatch(host):
                sent = as_sent(host)
                hint = f"; browsers send {sent}" if NAME.fullmatch(sent) else ""
                raise UserError(f"--allowed_hosts: {host!r} is not a name without a port, as example.org{hint}")
        for origin in self.allowed_origins:
            found = ORIGIN.fullmatch(origin)
            if found is None:
                raise UserError(f"--allowed_origins: {origin!r} is not an origin, as https://example.org")
            sent = f"{found['scheme']}://{as_sent(found['host'])}{found['port'] or ''}"
            sent = sent.removesuffix({"http": ":80", "https": ":443"}[found["scheme"]])
            if sent != origin:  # it would be compared with what browsers send, and never be the same
                raise UserError(f"--allowed_origins: {origin!r} is sent by browsers as {sent}; give that")

    def has_host(self, name: str | None) -> bool:
        """Return whether ``name`` is one of the server's."""
        return name is not None and (name == "localhost" or name in map(str.lower, self.hosts) or _is_loopback(name))


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return ``error`` as a response."""
    own = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    return JSONResponse(error.body(), error.status, {**own, **(headers or {})})


class Authentication:
    """Middleware that refuses a request before its body is read.

    A page of another site can make its reader's browser send requests to a server on loopback. They carry that site's
    ``Origin``; or, where the site's name was made to point at loopback (DNS rebinding), its name as ``Host``.

    Args:
        app: what answers the others.
        access: who may send requests. The page itself is given without a key: it asks for the key.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

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
        access, host, origin = self._access, headers.get("host", ""), headers.get("origin")
        if access.loopback and not access.has_host(_host_and_port(f"//{host}")[0]):
            raise ApiError(403, f"the Host is {host[:80]!a}, which is not localhost; --allowed_hosts adds names")
        if origin is not None and not self._is_allowed(origin, host):
            raise ApiError(403, f"a page of {origin[:80]!a} may not send requests; --allowed_origins adds origins")
        if access.key is not None and path != "/":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            matches = hmac.compare_digest(given.strip().encode("latin-1"), access.key.encode())
            if scheme.lower() != "bearer" or not matches:
                raise ApiError(401, "give the server's key: 'Authorization: Bearer KEY'", code="invalid_api_key")

    def _is_allowed(self, origin: str, host: str) -> bool:
        """Return whether a page of ``origin`` is the server's own, also behind a proxy, or an allowed one."""
        place = _host_and_port(origin)
        own = place == _host_and_port(f"{origin.partition(':')[0]}://{host}")
        known = self._access.allowed_origins
        return own or origin in known or str(place[0]) in map(str.lower, self._access.hosts)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_and_port(url: str) -> tuple[str | None, int | None]:
    """Return host and port of an address; (None, None) where it is none."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None, None
