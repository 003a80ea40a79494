"""What the server refuses, whom, and how it and its work end."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Command
from serving import KEY, LIMITS, Client, hold_scores, make_service, running

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.serve.authentication import Access
from mmrec.serve.command import listen
from mmrec.serve.protocol import CompletionRequest

# What is refused

BAD: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("completions", b"{", 400, "Invalid JSON"),
    "a list": ("completions", [], 400, "should be an object"),
    "unknown field": ("completions", {"promt": "to be"}, 400, "promt: Extra inputs are not permitted"),
    "number in a string": ("completions", {"max_tokens": "5"}, 400, "max_tokens: "),
    "half a character": ("completions", b'{"prompt": "\\ud800"}', 400, "Invalid JSON"),
    "not UTF-8": ("completions", b'{"prompt": "\xff"}', 400, "the body is not UTF-8 at byte 12"),
    "UTF-16": ("completions", '{"prompt": "to"}'.encode("utf-16"), 400, "the body is UTF-16"),
    "no number": ("completions", b'{"temperature": NaN}', 400, "temperature: "),
    "other model": ("completions", {"model": "gpt"}, 404, "there is no model 'gpt', but 'a'"),
    "unknown character": ("completions", {"prompt": "to be Ω"}, 400, "the character 'Ω' (in 'to be Ω')"),
    "empty prompt": ("completions", {"prompt": ""}, 400, "must not be empty without a memory"),
    "no prompts": ("completions", {"prompt": []}, 400, "prompt is an empty list"),
    "unsupported": ("completions", {"suffix": "to be"}, 400, "suffix: "),
    "best of more": ("completions", {"best_of": 2}, 400, "best_of: "),
    "many logprobs": ("completions", {"logprobs": 6}, 400, "logprobs: "),
    "long prompt": ("completions", {"prompt": "t" * 5001}, 400, "at most 5,000 are read at once"),
    "long prompts": ("completions", {"prompt": ["t" * 2501] * 2}, 400, "at most 5,000 are read at once"),
    "many tokens": ("completions", {"max_tokens": 4001}, 400, "at most 4000"),
    "many in all": ("completions", {"max_tokens": 1001, "n": 4}, 400, "4004 tokens to write"),
    "many choices": ("completions", {"n": 5}, 400, "5 choices; at most 4"),
    "hot": ("completions", {"temperature": 2.1}, 400, "temperature: "),
    "top_p": ("completions", {"top_p": 0}, 400, "top_p: "),
    "seed": ("completions", {"seed": 1 << 63}, 400, "seed: "),
    "stops": ("completions", {"stop": ["a"] * 5}, 400, "at most 4"),
    "empty stop": ("completions", {"stop": [""]}, 400, "a stop must have"),
    "save several": ("completions", {"n": 2, "save_memory": "a"}, 400, "one prompt and n 1"),
    "no such memory": ("completions", {"memory": "nothing"}, 404, "there is no memory 'nothing'"),
    "long score": ("score", {"text": "t" * 5001}, 400, "at most 5,000"),
    "long body": ("completions", b" " * 30_001, 413, "more than 30,000 bytes"),
    "nothing to read": ("memories", {"name": "a", "text": ""}, 400, "text: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(client: Client, memories: Path, case: str) -> None:
    path, asked, expected, says = BAD[case]
    status, answer = client.ask("POST", f"/v1/{path}", asked)
    assert (status, answer.keys()) == (expected, {"error"})
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    status, _ = client.ask("POST", f"/v1/{path}", {"stream": True, **asked} if isinstance(asked, dict) else asked)
    assert status in (expected, 400)
    assert list(memories.iterdir()) == []


def test_fields_that_ask_for_nothing_are_let_through(client: Client) -> None:
    asked = {"echo": False, "best_of": 1, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0}
    text = client.text(prompt="to be", seed=1, **asked, logit_bias={}, suffix=None, user="someone", stop=None)
    assert text == client.text(prompt="to be", seed=1)
    assert len(text) == 16


def test_a_byte_order_mark_before_the_body_is_left_out(client: Client) -> None:
    asked = {"prompt": "to be", "seed": 1}
    whole = client.good("POST", "/v1/completions", b"\xef\xbb\xbf" + json.dumps(asked).encode())
    assert whole["choices"][0]["text"] == client.text(**asked)


def test_unknown_paths_and_methods(client: Client) -> None:
    for method, path, expected in (("GET", "/v2", 404), ("GET", "/v1/score", 405), ("GET", "/docs", 404)):
        status, answer = client.ask(method, path)
        assert (status, answer.keys()) == (expected, {"error"})


def test_only_json(client: Client) -> None:
    body = json.dumps({"prompt": "to be"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"):
        assert client.ask("POST", "/v1/completions", body, content_type=kind)[0] == 415
    assert client.ask("POST", "/v1/completions", body, content_type="application/json; charset=utf-8")[0] == 200
    assert client.ask("PUT", "/v1/memories/a/file", body)[0] == 415


def test_other_hosts_and_pages_are_refused(client: Client) -> None:
    port = client.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.", "", "[::1", "@"):
        status, answer = client.ask("GET", "/v1/models", host=host)
        assert (status, "which is not localhost" in answer["error"]["message"]) == (403, True), host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST:1"):
        assert client.ask("GET", "/v1/models", host=host)[0] == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}", "http://[", "file://"):
        assert client.ask("POST", "/v1/score", {"text": "to be"}, origin=origin)[0] == 403, origin
    assert client.ask("POST", "/v1/score", {"text": "to be"}, origin=f"http://127.0.0.1:{port}")[0] == 200


def test_the_key(small_model: LoadedModel, memories: Path) -> None:
    with running(make_service(small_model, memories), Access(KEY, loopback=False)) as client:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("DELETE", "/v1/memories/a")):
                with client.open(method, path, {} if method == "POST" else None, **given) as response:
                    assert response.status == 401
                    assert response.getheader("www-authenticate") == "Bearer"
                    assert json.loads(response.read())["error"]["code"] == "invalid_api_key"
        right = {"authorization": f"Bearer {KEY}"}
        assert client.ask("GET", "/v1/models", **right)[0] == 200
        assert client.ask("GET", "/v1/models", **right, host="model.example")[0] == 200
        assert client.ask("GET", "/v1/models", **right, host="model.example", origin="https://evil.example")[0] == 403
        assert client.ask("GET", "/")[0] == 200


def test_more_than_may_wait_are_told_to_come_back(small_model: LoadedModel, memories: Path) -> None:
    service = make_service(small_model, memories, replace(LIMITS, running=1, waiting=1))
    go_on = hold_scores(service)
    with running(service) as client, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.ask, "POST", "/v1/score", {"text": "to be"}) for _ in range(2)]
        assert client.workers is not None
        while client.workers.busy < 2:
            time.sleep(0.01)
        with client.open("POST", "/v1/score", {"text": "to be"}) as response:
            assert (response.status, response.getheader("retry-after")) == (429, "1")
            assert json.loads(response.read())["error"]["type"] == "rate_limit_error"
        assert client.ask("GET", "/v1/models")[0] == 200  # the loop is free to answer
        go_on.set()
        assert [future.result() for future in asked] == [(200, {"done": True})] * 2
        assert client.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_ends_the_work(small_model: LoadedModel, memories: Path, stream: bool) -> None:
    limits = replace(LIMITS, running=1, waiting=3, max_tokens=10**8)  # hours of writing
    with running(make_service(small_model, memories, limits)) as client:
        body = json.dumps({"prompt": "to be", "max_tokens": 10**8, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        several = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(3)]
        for connection in several:
            connection.sendall(request)
        assert client.workers is not None
        while client.workers.busy < 3:
            time.sleep(0.01)
        if stream:
            assert several[0].recv(100).startswith(b"HTTP/1.1 200")
        for connection in reversed(several):  # those that wait first
            connection.close()
        assert client.idle()
        assert len(client.text(prompt="to be", max_tokens=5)) == 5


def test_the_server_ends_while_it_writes(small_model: LoadedModel, memories: Path) -> None:
    with ExitStack() as after:
        with running(make_service(small_model, memories, replace(LIMITS, max_tokens=10**8))) as client:
            asked = {"max_tokens": 10**8, "stream": True}
            response = after.enter_context(client.open("POST", "/v1/completions", asked))
            assert response.read(10)
        assert b"the server is being stopped" in response.read()


def test_too_many_memories(small_model: LoadedModel, memories: Path) -> None:
    with running(make_service(small_model, memories, replace(LIMITS, memories=2))) as client:
        for name in ("a", "b", "a"):
            client.good("POST", "/v1/memories", {"name": name, "text": "to be"})
        data = client.good("GET", "/v1/memories/a/file")
        for method, path, body, kind in (
            ("POST", "/v1/memories", {"name": "c", "text": "to be"}, "application/json"),
            ("PUT", "/v1/memories/c/file", data, "application/octet-stream"),
            ("POST", "/v1/completions", {"save_memory": "c"}, "application/json"),
        ):
            status, answer = client.ask(method, path, body, content_type=kind)
            assert (status, "delete one first" in answer["error"]["message"]) == (409, True)
        *_, last = client.stream(save_memory="c")
        assert "delete one first" in last["error"]["message"]
    small = replace(LIMITS, memory_bytes=2 * (memories / "a.mem").stat().st_size + 10)
    with running(make_service(small_model, memories, small)) as client:
        status, answer = client.ask("POST", "/v1/memories", {"name": "c", "text": "to be"})
        assert (status, "as much room as they may" in answer["error"]["message"]) == (409, True)
        client.good("POST", "/v1/memories", {"name": "b", "text": "to be or"})
    assert {path.name for path in memories.iterdir()} == {"a.mem", "b.mem"}


def test_random_requests_are_answered(client: Client) -> None:
    """Whatever is asked, the server does not fail."""
    choose = random.Random(0)
    fields = [*CompletionRequest.model_fields, "text", "name", "suffix"]
    values: list[Any] = [None, True, 0, 1, -1, 2.5, 1e-320, 1e-38, 5e-7, 1e400, 10**30]
    values += ["", "to be", "a", "../a", "\0", "ü", []]
    values += [{}, ["to be", "to be"], [""], [[1]], {"include_usage": True}, "t" * 3000, (1 << 63) - 1]
    statuses = set()
    for _ in range(400):
        chosen = {choose.choice(fields): choose.choice(values) for _ in range(choose.randrange(7))}
        asked = {"prompt": "to be", "max_tokens": 3} | chosen if choose.random() < 0.5 else chosen
        body = bytearray(json.dumps(asked).encode())
        if choose.random() < 0.3:
            for _ in range(choose.randrange(1, 4)):
                body[choose.randrange(len(body))] = choose.randrange(256)
        path = choose.choice(["completions", "completions", "score", "memories"])
        with client.open("POST", f"/v1/{path}", bytes(body)) as response:
            answer = response.read()
        assert response.status < 500, (body, answer)
        statuses.add(response.status)
    assert {200, 400} <= statuses
    assert client.idle()


# The command


@pytest.mark.slow
def test_the_command(small_root: Path, tmp_path: Path) -> None:
    options = [f"--root={small_root}", "--port=0", "--memories=mems", "--limits.max_tokens=10000000"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mmrec", "serve", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MMREC_API_KEY": ""},
    )
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        found = re.fullmatch(r"a: http://127\.0\.0\.1:(\d+); Ctrl-C stops\n", line)
        assert found, line
        client = Client(int(found[1]))
        assert len(client.text(prompt="to be", max_tokens=5, save_memory="x")) == 5
        with client.open("POST", "/v1/completions", {"max_tokens": 10**7, "stream": True}) as response:
            assert response.read(10)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    assert (tmp_path / "mems" / "x.mem").is_file()


def test_what_the_command_refuses(mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listening, _ = listen("127.0.0.1", 0)
    with listening, pytest.MonkeyPatch.context() as patch:
        Path("file").write_text("")
        patch.delenv("MMREC_API_KEY", raising=False)
        cases = [
            ([f"--port={listening.getsockname()[1]}"], "something else listens there"),
            (["--port=70000"], "--port is 70000"),
            (["--port=0", "--host=0.0.0.0"], "needs a key: set MMREC_API_KEY"),
            (["--port=0", "--host=no.such.host.invalid"], "cannot listen there"),
            (["--port=0", "--ckpt=nothing.ckpt"], "no such checkpoint"),
            (["--port=0", "--memories=file"], "file: cannot be made"),
            (["--port=0", "--limits.running=0"], "--limits.running is 0; it must be at least 1"),
        ]
        for args, says in cases:
            assert mmrec("serve", f"--root={small_root}", *args) == 2, args
            error = capsys.readouterr().err
            assert says in error
            assert error.count("\n") == 1
        for key in ("short", "with a space in it", "ü" * 20):
            patch.setenv("MMREC_API_KEY", key)
            assert mmrec("serve", f"--root={small_root}", "--port=0", "--host=0.0.0.0") == 2
            assert "MMREC_API_KEY must have at least 16" in capsys.readouterr().err


def test_without_the_extra(
    mmrec: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("mmrec.serve", "fastapi", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert mmrec("serve") == 2
    error = capsys.readouterr().err
    assert "pip install 'mmrec[serve]'" in error
    assert error.count("\n") == 1


def test_listening(capsys: pytest.CaptureFixture[str]) -> None:
    for host, expected in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        listening, loopback = listen(host, 0)
        listening.close()
        assert loopback is expected
    with pytest.raises(UserError, match="cannot listen there"):
        listen("192.0.2.1", 0)  # of nobody: RFC 5737


def test_help_names_what_it_needs(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("serve", "--help") == 0
    shown = capsys.readouterr().out
    assert "--limits.running" in shown
    assert "--memories" in shown
