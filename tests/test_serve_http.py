"""The server as HTTP has it: connections, hosts and origins, methods, encodings, fields that ask for nothing."""

from __future__ import annotations

import gzip
import json
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, LIMITS, Client, make_service, running

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.serve import connections
from mmrec.serve.authentication import Access
from mmrec.serve.command import ServeOptions
from mmrec.serve.limits import Limits

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(client: Client, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


# Connections


@pytest.mark.parametrize("slow", [b"", HEAD, HEAD + b"Content-Length: 99\r\n\r\n{"], ids=["silent", "head", "body"])
def test_silent_and_slow_connections_shut_nobody_out(small_model: LoadedModel, memories: Path, slow: bytes) -> None:
    """100 silent and 100 slow ones, beside the limit of 128: a client with work is answered at once."""
    limits = replace(LIMITS, connections=Limits().connections)
    with running(make_service(small_model, memories, limits)) as client, ExitStack() as stack:
        client.text(prompt="to be", max_tokens=5)
        silent = [stack.enter_context(connect(client)) for _ in range(100)]
        dripping = [stack.enter_context(connect(client, slow)) for _ in range(100)]
        for connection in dripping[-20:]:
            connection.sendall(b"X" if slow.endswith(b"{") else b"X-Drip: 1\r\n")
        for _ in range(3):
            assert len(client.text(prompt="to be", max_tokens=5)) == 5
        assert is_closed(silent[0])  # the one that waited longest made room


def test_they_are_closed_after_some_seconds(
    small_model: LoadedModel, memories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    with running(make_service(small_model, memories)) as client, ExitStack() as stack:
        silent, slow = (stack.enter_context(connect(client, sent)) for sent in (b"", HEAD))
        again = stack.enter_context(connect(client, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        while b"owned_by" not in again.recv(1000):
            pass
        again.sendall(b"GET /v1/models HTTP/1.1\r\nX-Drip: 1\r\n")
        assert all(map(is_closed, (silent, slow, again)))
        # Work that takes longer than that is not given up.
        asked = {"prompt": "to be", "max_tokens": 4000, "temperature": 0}
        assert len(client.text(**asked)) == 4000


def test_work_is_not_displaced(small_model: LoadedModel, memories: Path) -> None:
    limits = replace(LIMITS, connections=4, max_tokens=10**8)
    with running(make_service(small_model, memories, limits)) as client, ExitStack() as stack:
        body = json.dumps({"max_tokens": 10**8, "stream": True}).encode()
        request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        working = stack.enter_context(connect(client, request))
        assert working.recv(100).startswith(b"HTTP/1.1 200")
        others = [stack.enter_context(connect(client)) for _ in range(10)]
        assert client.ask("GET", "/v1/models")[0] == 200
        assert is_closed(others[0])
        assert working.recv(100)
        assert client.workers is not None
        for count in range(2, 5):
            stack.enter_context(connect(client, request))
            for _ in range(500):
                if client.workers.busy == count:
                    break
                time.sleep(0.02)
            assert client.workers.busy == count
        assert client.ask("GET", "/v1/models")[0] == 503  # all four are at work


# Hosts and origins


def test_addresses_of_loopback_and_own_names_are_hosts(small_model: LoadedModel, memories: Path) -> None:
    access = Access(hosts=("Example.org", "my-machine"))
    with running(make_service(small_model, memories), access) as client:
        for host in ("127.0.0.2", "127.1.2.3:80", "example.org", "EXAMPLE.org:8443", "my-machine:8000", "[::1]:1"):
            assert client.ask("GET", "/v1/models", host=host)[0] == 200, host
        for host in ("evil.example", "example.org.evil.example", "10.0.0.1", "127.0.0.1.evil.example"):
            assert client.ask("GET", "/v1/models", host=host)[0] == 403, host
        # A proxy with TLS, which passes its Host on, or does not.
        page = {"origin": "https://example.org"}
        assert client.ask("POST", "/v1/score", {"text": "to be"}, host="example.org", **page)[0] == 200
        assert client.ask("POST", "/v1/score", {"text": "to be"}, **page)[0] == 200
        status, answer = client.ask("POST", "/v1/score", {"text": "to be"}, origin="https://evil.example")
        assert (status, "--allowed_origins" in answer["error"]["message"]) == (403, True)


def test_the_host_option_is_a_host() -> None:
    assert ServeOptions(host="my-machine").access(loopback=True).has_host("my-machine")
    assert ServeOptions(host="127.0.0.2").access(loopback=True).has_host("127.0.0.2")
    assert not ServeOptions().access(loopback=True).has_host("my-machine")
    assert ServeOptions(host="B\u00fccher.local").access(loopback=True).has_host("xn--bcher-kva.local")


def test_allowed_origins_are_answered_as_browsers_need_it(small_model: LoadedModel, memories: Path) -> None:
    origin = "https://app.example.org"
    access = Access(KEY, allowed_origins=(origin,))
    with running(make_service(small_model, memories), access) as client:
        wanted = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
        with client.open("OPTIONS", "/v1/completions", origin=origin, **wanted) as response:
            assert (response.status, response.getheader("access-control-allow-origin")) == (200, origin)
        with client.open("GET", "/v1/models", origin=origin, authorization=f"Bearer {KEY}") as response:
            assert (response.status, response.getheader("access-control-allow-origin")) == (200, origin)
        assert client.ask("GET", "/v1/models", origin="https://evil.example", authorization=f"Bearer {KEY}")[0] == 403
        with client.open("OPTIONS", "/v1/completions", origin="https://evil.example", **wanted) as response:
            assert response.getheader("access-control-allow-origin") is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hosts": ("example.org:80",)}, "--allowed_hosts: 'example.org:80'"),
        ({"hosts": ("https://example.org",)}, "--allowed_hosts"),
        ({"hosts": ("",)}, "--allowed_hosts"),
        ({"hosts": ("*",)}, r"--allowed_hosts: '\*' is not a name"),
        ({"hosts": ("*.example.org",)}, "--allowed_hosts"),
        ({"hosts": (".example.org",)}, "--allowed_hosts"),
        ({"hosts": ("b\u00fccher.example",)}, "; browsers send xn--bcher-kva.example"),
        ({"allowed_origins": ("example.org",)}, "--allowed_origins: 'example.org'"),
        ({"allowed_origins": ("*",)}, "--allowed_origins"),
        ({"allowed_origins": ("https://example.org/page",)}, "--allowed_origins"),
        ({"allowed_origins": ("https://*.example.org",)}, "--allowed_origins"),
        ({"allowed_origins": ("https://Example.org",)}, "is sent by browsers as https://example.org; give that"),
        ({"allowed_origins": ("https://example.org:443",)}, "is sent by browsers as https://example.org; give that"),
        ({"allowed_origins": ("http://b\u00fccher.example:8080",)}, "as http://xn--bcher-kva.example:8080;"),
    ],
)
def test_what_is_no_host_or_origin_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Access(**options)


# Methods, models, encodings


def test_a_model_by_its_name(client: Client) -> None:
    assert client.good("GET", "/v1/models/a") == client.good("GET", "/v1/models")["data"][0]
    status, answer = client.ask("GET", "/v1/models/gpt-4o")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_head_is_get_without_a_body(client: Client) -> None:
    for path in ("/", "/v1/models", "/v1/models/a", "/v1/memories"):
        with client.open("HEAD", path) as head, client.open("GET", path) as get:
            assert head.status == get.status == 200
            assert head.getheader("content-length") == get.getheader("content-length")
            assert head.read() == b""


def test_405_says_what_is_allowed(client: Client) -> None:
    for method, path, allowed in (
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/memories", "GET, HEAD, POST"),
        ("POST", "/v1/memories/a", "DELETE, GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
    ):
        with client.open(method, path) as response:
            assert (response.status, response.getheader("allow")) == (405, allowed)


def test_the_scheme_of_the_key_in_any_case(small_model: LoadedModel, memories: Path) -> None:
    with running(make_service(small_model, memories), Access(KEY)) as client:
        for given in (f"bearer {KEY}", f"BEARER {KEY}", f"Bearer  {KEY}"):
            assert client.ask("GET", "/v1/models", authorization=given)[0] == 200
        for given in (f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x"):
            assert client.ask("GET", "/v1/models", authorization=given)[0] == 401


def test_bodies_may_be_gzip(client: Client) -> None:
    asked = {"prompt": "to be", "max_tokens": 5, "seed": 1}
    body = gzip.compress(json.dumps(asked).encode())
    answer = client.good("POST", "/v1/completions", body, content_encoding="gzip")
    assert answer["choices"][0]["text"] == client.text(**asked)
    bomb = gzip.compress(b" " * 10**8)
    for sent, encoding, status in (
        (bomb, "gzip", 413), (body[:-9], "gzip", 400), (body + b"x", "gzip", 400), (b"{}", "gzip", 400),
        (body, "br", 415),
    ):  # fmt: skip
        assert client.ask("POST", "/v1/completions", sent, content_encoding=encoding)[0] == status, encoding


# Fields


@pytest.mark.parametrize(
    "nothing",
    [
        {"suffix": ""}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"stream_options": {"include_obfuscation": False}},
        {"logprobs": False}, {"stop": ""}, {"stop": []}, {"top_k": 0}, {"top_k": -1}, {"store": False},
        {"metadata": {}}, {"user": "me", "prompt_cache_key": "x"}, {"repetition_penalty": 1.0, "min_p": 0},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_ask_for_nothing_change_nothing(client: Client, nothing: dict[str, Any]) -> None:
    asked = {"prompt": "to be", "max_tokens": 8, "seed": 1}
    plain = client.complete(**asked, n=nothing.get("n", 1))["choices"]
    assert client.complete(**{**asked, **nothing})["choices"] == plain


def test_fields_that_ask_for_something_are_not_left_out(client: Client) -> None:
    for field in ({"suffix": "x"}, {"best_of": 3}, {"store": True}, {"logit_bias": {"1": 2}}, {"echo": 0}):
        status, answer = client.ask("POST", "/v1/completions", {"prompt": "to be", **field})
        assert (status, answer["error"]["param"]) == (400, next(iter(field)))
    assert client.complete(prompt="to be", logprobs=0, max_tokens=3)["choices"][0]["logprobs"] is not None
    greedy = client.text(prompt="to be", max_tokens=20, temperature=0)
    assert client.text(prompt="to be", max_tokens=20, top_k=1, seed=7) == greedy


def test_twenty_prompts_at_once(small_model: LoadedModel, memories: Path) -> None:
    with running(make_service(small_model, memories, Limits())) as client:
        assert len(client.complete(prompt=["to be"] * 20, max_tokens=2)["choices"]) == 20
