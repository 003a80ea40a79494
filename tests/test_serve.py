"""The server: real requests to a real server on loopback, and a real browser."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_text
from helpers import fit

from mmrec.checkpoint import Trained, load_trained
from mmrec.cli import main
from mmrec.errors import UserError
from mmrec.generate import continue_text
from mmrec.memory import Memory, load_memory, model_hash, save_memory
from mmrec.model import MemoryLM, Shape
from mmrec.serve.command import Server, listen
from mmrec.serve.limits import Limits
from mmrec.serve.memories import Memories
from mmrec.serve.protocol import CompletionAsked, ScoreAsked
from mmrec.serve.service import Ended, Piece, Service, StopFinder
from mmrec.serve.workers import Workers
from mmrec.tokenizers import ByteTokenizer

Command = Callable[..., int]
LIMITS = Limits(body_bytes=30_000, prompt_tokens=5000, max_tokens=4000, choices=4, memories=20)
KEY = "a key of the tests"
KEY_WITHOUT_SPACES = KEY.replace(" ", "-")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


class Client:
    """Asks a server on loopback."""

    def __init__(self, port: int, workers: Workers | None = None) -> None:
        self.port, self.workers = port, workers

    @contextmanager
    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, given)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with self.open(method, path, body, **headers) as response:
            data = response.read()
            kind = response.getheader("content-type", "")
            return response.status, json.loads(data) if kind.startswith("application/json") else data

    def good(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        status, answer = self.ask(method, path, body, **headers)
        assert status in (200, 201), answer
        return answer

    def complete(self, **asked: Any) -> Any:
        return self.good("POST", "/v1/completions", asked)

    def text(self, **asked: Any) -> str:
        (choice,) = self.complete(**asked)["choices"]
        return str(choice["text"])

    def stream(self, **asked: Any) -> list[Any]:
        with self.open("POST", "/v1/completions", {"stream": True, **asked}) as response:
            assert response.getheader("content-type", "").startswith("text/event-stream")
            events = response.read().decode("utf-8").split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def idle(self) -> bool:
        """Whether all work ends within some seconds."""
        assert self.workers is not None
        for _ in range(500):
            if not self.workers.busy:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def running(service: Service, key: str | None = None, loopback: bool = True) -> Iterator[Client]:
    listening, _ = listen("127.0.0.1", 0)
    with listening:
        server = Server(service, key, loopback)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(listening.getsockname()[1], server.workers)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run "a", trained for an epoch."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "text.txt").write_text(make_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "--input_file=text.txt", "--output_dir=tokens", "--tokenizer=characters"]) == 0
        assert main([*fit(folder / "tokens", "--trainer.max_epochs=1", "--run=a")]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Trained:
    return load_trained(root / "lightning_logs/a/checkpoints/best.ckpt")


def make_service(trained: Trained, folder: Path, limits: Limits = LIMITS) -> Service:
    return Service("a", trained, Memories(folder, trained, limits), limits)


def opened(trained: Trained, path: Path) -> Memory:
    return load_memory(path, trained.net, model_hash(trained.net, trained.tokenizer))


def assert_same(one: Memory, other: Memory) -> None:
    assert one.position == other.position
    torch.testing.assert_close([one.logits, *one.state], [other.logits, *other.state], rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def client(trained: Trained, folder: Path) -> Iterator[Client]:
    with running(make_service(trained, folder)) as client:
        yield client


def of_bytes(folder: Path) -> Service:
    torch.manual_seed(0)
    shape = Shape(dim=16, layers=2, memories=("short", "long"), heads=2, ffn_dim=24)
    return make_service(Trained(MemoryLM(shape, 256).eval(), ByteTokenizer(), 0), folder)


# Writing


def test_models(client: Client) -> None:
    answer = client.good("GET", "/v1/models")
    assert [(model["id"], model["object"]) for model in answer["data"]] == [("a", "model")]


def test_it_writes_what_generate_writes(client: Client, root: Path) -> None:
    shown = io.StringIO()
    options = ["--prompt=to be", "--length=80", "--temperature=0.7", "--top_p=0.9", "--seed=3"]
    with redirect_stdout(shown):
        assert main(["generate", f"--root={root}", *options]) == 0
    asked = {"model": "a", "prompt": "to be", "max_tokens": 80, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    answer = client.complete(**asked)
    assert "to be" + answer["choices"][0]["text"] + "\n" == shown.getvalue()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 80, "total_tokens": 85}
    *events, ended, usage = client.stream(**asked, stream_options={"include_usage": True})
    assert "".join(event["choices"][0]["text"] for event in events) == answer["choices"][0]["text"]
    assert len(events) == 80
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "length")
    assert (usage["choices"], usage["usage"]) == ([], answer["usage"])
    assert len({event["id"] for event in events}) == 1


def test_several_choices_are_those_of_one_after_the_other(client: Client) -> None:
    prompts = ["to be", "that is the question"]
    choices = client.complete(prompt=prompts, n=2, max_tokens=30, seed=5)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = [client.text(prompt=prompts[i // 2], max_tokens=30, seed=5 + i) for i in range(4)]
    assert [choice["text"] for choice in choices] == alone
    assert len(set(alone)) == 4


def test_without_a_seed_texts_differ(client: Client) -> None:
    assert client.text(prompt="to be", max_tokens=60) != client.text(prompt="to be", max_tokens=60)


def test_stop(client: Client) -> None:
    whole = client.text(prompt="to be", max_tokens=200, seed=1)
    for stop in (whole[50:53], [whole[90:92], "@", whole[120:124]], [whole[:1]]):
        stops = [stop] if isinstance(stop, str) else stop
        _, first = min((whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole)
        answer = client.complete(prompt="to be", max_tokens=200, seed=1, stop=stop)["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (whole[:first], "stop")
        events = client.stream(prompt="to be", max_tokens=200, seed=1, stop=stop)
        assert "".join(event["choices"][0]["text"] for event in events) == whole[:first]


def test_stops_are_found_however_the_text_comes() -> None:
    choose = random.Random(0)
    for _ in range(500):
        text = "".join(choose.choices("ab", k=20))
        stops = ["".join(choose.choices("ab", k=choose.randrange(1, 7))) for _ in range(choose.randrange(4))]
        finder, passed, rest = StopFinder(stops), "", text
        while rest and not finder.found:
            size = choose.randrange(1, 5)
            passed, rest = passed + finder.push(rest[:size]), rest[size:]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert passed + finder.flush() == text[: min(ends, default=(0, len(text)))[1]]
        assert finder.found == bool(ends)


def test_pieces_are_whole_characters(folder: Path) -> None:
    service, text = of_bytes(folder), "Çay, üç şişe, öğle çorbas\u0131… 😀"
    *_, score = service.score(ScoreAsked(text=text))
    assert score is not None
    assert score["pieces"]["text"] == list(text)
    assert score["tokens"] == len(text.encode()) - 1
    assert sum(score["pieces"]["nats"]) == pytest.approx(score["nats"], abs=1e-3)

    asked = CompletionAsked(prompt=text, max_tokens=300, seed=0)
    events = list(service.complete(asked))
    pieces = [event.text for event in events if isinstance(event, Piece)]
    (ended,) = (event for event in events if isinstance(event, Ended))
    assert ended.tokens == 300
    # A model of random weights writes bytes at random; some of them are characters of several bytes.
    prompt = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    drawn = bytes(continue_text(service._net, prompt, 300, 1.0, seed=0))
    assert "".join(pieces) == drawn.decode("utf-8", errors="replace")
    assert any(len(piece.encode()) > 1 and "\ufffd" not in piece for piece in pieces)


# Memories


def test_going_on_from_a_memory(client: Client, folder: Path, root: Path, trained: Trained) -> None:
    text = make_text()
    kept = client.good("POST", "/v1/memories", {"name": "book", "text": text[:3000]})
    assert (kept["id"], kept["position"], kept["usable"]) == ("book", 3000, True)
    more = client.good("POST", "/v1/memories", {"name": "more", "text": text[3000:4000], "memory": "book"})
    assert more["position"] == 4000
    whole = client.text(prompt=text[:4000], max_tokens=60, seed=1)
    assert client.text(memory="more", max_tokens=60, seed=1) == whole
    assert client.text(memory="book", prompt=text[3000:4000], max_tokens=60, seed=1) == whole

    (root / "book.txt").write_text(text[:3000])
    assert main(["read", str(root / "book.txt"), f"--save={root / 'book.mem'}", f"--root={root}"]) == 0
    assert_same(opened(trained, folder / "book.mem"), opened(trained, root / "book.mem"))


def test_what_was_written_is_remembered(client: Client) -> None:
    whole = client.text(prompt="to be", max_tokens=50, temperature=0)
    answer = client.complete(prompt="to be", max_tokens=20, temperature=0, save_memory="me")["choices"][0]
    assert (answer["memory"]["id"], answer["memory"]["position"]) == ("me", 25)
    again = client.stream(memory="me", max_tokens=30, temperature=0, save_memory="me")
    assert answer["text"] + "".join(event["choices"][0]["text"] for event in again) == whole
    assert again[-1]["choices"][0]["memory"]["position"] == 55
    stop = whole[7:10]
    short = client.complete(prompt="to be", max_tokens=50, temperature=0, stop=stop, save_memory="me")["choices"][0]
    assert short["memory"]["position"] == 5 + len(short["text"])
    read = client.complete(prompt="to be", max_tokens=0, save_memory="only-read")["choices"][0]
    assert (read["text"], read["memory"]["position"]) == ("", 5)


def test_memories_go_in_and_out(client: Client, trained: Trained, tmp_path: Path) -> None:
    assert client.good("GET", "/v1/memories") == {"object": "list", "data": []}
    for name in ("b", "a"):
        client.good("POST", "/v1/memories", {"name": name, "text": "to be or not to be"})
    listed = client.good("GET", "/v1/memories")["data"]
    assert [memory["id"] for memory in listed] == ["a", "b"]
    assert client.good("GET", "/v1/memories/a") == listed[0]
    with client.open("GET", "/v1/memories/a/file") as response:
        assert response.getheader("content-disposition") == 'attachment; filename="a.mem"'
        data = response.read()
    (tmp_path / "x.mem").write_bytes(data)
    put = client.good("PUT", "/v1/memories/copy/file", data, content_type="application/octet-stream")
    assert (put["id"], put["position"]) == ("copy", 18)
    (tmp_path / "copy.mem").write_bytes(client.good("GET", "/v1/memories/copy/file"))
    assert_same(opened(trained, tmp_path / "x.mem"), opened(trained, tmp_path / "copy.mem"))
    assert client.text(memory="copy", max_tokens=20, seed=1) == client.text(memory="a", max_tokens=20, seed=1)
    assert client.good("DELETE", "/v1/memories/a")["deleted"] is True
    for method, path in (("DELETE", "a"), ("GET", "a"), ("GET", "a/file")):
        status, answer = client.ask(method, f"/v1/memories/{path}")
        assert (status, answer["error"]["code"]) == (404, "memory_not_found")
    assert [memory["id"] for memory in client.good("GET", "/v1/memories")["data"]] == ["b", "copy"]


BAD_NAMES = ["../a", "a/b", "", ".a", "a.mem", "-a", "a" * 65, "ä", "a\n", "a\0", "..", "con fig"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(client: Client, folder: Path, name: str) -> None:
    for path, asked in (
        ("/v1/memories", {"name": name, "text": "to be"}),
        ("/v1/completions", {"prompt": "to be", "memory": name}),
        ("/v1/completions", {"prompt": "to be", "save_memory": name}),
        ("/v1/score", {"text": "to be", "memory": name}),
    ):
        status, answer = client.ask("POST", path, asked)
        assert status == 400
        assert "is no name of a memory" in answer["error"]["message"]
    assert list(folder.iterdir()) == []
    assert {path.name for path in folder.parent.iterdir()} == {"memories"}


def test_names_in_a_path(client: Client, folder: Path) -> None:
    (folder.parent / "secret.mem").write_bytes(b"secret")
    for name in ("..%2Fsecret", "%2e%2e%2fsecret", "../secret", "..", ".", "%00", "a%0a"):
        for method, path in (("GET", f"{name}/file"), ("GET", name), ("DELETE", name)):
            status, _ = client.ask(method, f"/v1/memories/{path}")
            assert status in (400, 404, 405)
    assert (folder.parent / "secret.mem").exists()


def test_bad_uploads(client: Client, folder: Path, trained: Trained, tmp_path: Path) -> None:
    model = model_hash(trained.net, trained.tokenizer)
    empty = Memory.empty(trained.net)
    path = tmp_path / "x.mem"

    def saved(memory: Memory, of: str = model) -> bytes:
        save_memory(path, memory, of)
        return path.read_bytes()

    (past, inner), *others = empty.state
    damaged = bytearray(saved(empty))
    damaged[-5] ^= 1
    for data, says in (
        (b"", "is not a readable memory"),
        (b"\xff" * 100, "is not a readable memory"),
        (bytes(damaged), "damaged"),
        (saved(empty, "0" * 64), "the memory of another model"),
        (saved(Memory(empty.state[1:], empty.logits, 3)), "does not hold what a memory of this model does"),
        (saved(Memory([(past, inner.bfloat16().float()[:, :1]), *others], empty.logits, 3)), "does not hold"),
        (saved(Memory([(past, inner + torch.nan), *others], empty.logits, 3)), "not finite"),
        (saved(Memory([(past, inner + 1e38), *others], empty.logits, 3)), "larger than reading ever makes them"),
        (saved(Memory(empty.state, empty.logits + 1e38, 3)), "larger than reading ever makes them"),
    ):
        status, answer = client.ask("PUT", "/v1/memories/a/file", data, content_type="application/octet-stream")
        assert status == 400, says
        assert says in answer["error"]["message"]
        assert str(folder) not in answer["error"]["message"]
        assert list(folder.iterdir()) == []
    status, _ = client.ask("PUT", "/v1/memories/a/file", b"x" * 500_000, content_type="application/octet-stream")
    assert status == 413


def test_a_damaged_or_foreign_file_in_the_folder(client: Client, folder: Path, trained: Trained) -> None:
    (folder / "bad.mem").write_bytes(b"nothing")
    save_memory(folder / "other.mem", Memory.empty(trained.net), "another")
    assert [(m["id"], m["usable"]) for m in client.good("GET", "/v1/memories")["data"]] == [("other", False)]
    for name in ("bad", "other"):
        status, answer = client.ask("POST", "/v1/completions", {"memory": name})
        assert status == 400
        assert answer["error"]["message"].startswith(f"{name}: ")


def test_users_do_not_meet(client: Client, folder: Path) -> None:
    """Many at a time, each with a memory of its own: each gets what it gets alone, and no memory changes."""
    text = make_text()
    for user in range(6):
        client.good("POST", "/v1/memories", {"name": f"user{user}", "text": text[user * 1500 : user * 1500 + 1000]})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def use(user: int) -> tuple[str, list[Any], Any]:
        memory = f"user{user}"
        written = client.text(memory=memory, prompt="that", max_tokens=40, seed=user)
        events = client.stream(memory=memory, prompt="to be", max_tokens=40, seed=user, temperature=0.5)
        score = client.good("POST", "/v1/score", {"text": text[: 500 + user], "memory": memory})
        return written, [event["choices"][0]["text"] for event in events], score

    alone = [use(user) for user in range(6)]
    assert len({written for written, _, _ in alone}) == 6
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(use, [*range(6)] * 3))
    assert together == alone * 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert client.idle()


def test_saving_under_one_name_at_the_same_time(client: Client, folder: Path) -> None:
    def save(user: int) -> Any:
        return client.good("POST", "/v1/memories", {"name": "one", "text": "to be " * (user + 1)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(16)))
    assert client.good("GET", "/v1/memories/one")["position"] in {6 * (user + 1) for user in range(16)}
    assert client.text(memory="one", max_tokens=5)
    assert [path.name for path in folder.iterdir()] == ["one.mem"]


# Scores


def test_score_is_that_of_the_command(client: Client, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = make_text()[:3000]
    (root / "scored.txt").write_text(text)
    assert main(["score", str(root / "scored.txt"), f"--root={root}", f"--surprise={root / 'costs.tsv'}"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    answer = client.good("POST", "/v1/score", {"text": text})
    assert answer["tokens"] == 2999
    assert f"{answer['nats_per_token']:.4f} nats/token" in line
    assert f"{answer['bits_per_byte']:.4f} bits/byte" in line
    costs = [float(row.split("\t")[2]) for row in (root / "costs.tsv").read_text().splitlines()[1:]]
    assert "".join(answer["pieces"]["text"]) == text
    assert answer["pieces"]["nats"][0] is None
    assert [nats or 0 for nats in answer["pieces"]["nats"]] == pytest.approx(costs, abs=1e-4)
    client.good("POST", "/v1/memories", {"name": "begin", "text": text[:2000]})
    end = client.good("POST", "/v1/score", {"text": text[2000:], "memory": "begin"})
    assert end["pieces"]["nats"] == pytest.approx(costs[2000:], abs=1e-3)


# What is refused

BAD: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("completions", b"{", 400, "Invalid JSON"),
    "a list": ("completions", [], 400, "should be an object"),
    "unknown field": ("completions", {"promt": "to be"}, 400, "promt: Extra inputs are not permitted"),
    "number in a string": ("completions", {"max_tokens": "5"}, 400, "max_tokens: "),
    "half a character": ("completions", b'{"prompt": "\\ud800"}', 400, "Invalid JSON"),
    "not UTF-8": ("completions", b'{"prompt": "\xff"}', 400, "Invalid JSON"),
    "no number": ("completions", b'{"temperature": NaN}', 400, "temperature: "),
    "other model": ("completions", {"model": "gpt"}, 404, "there is no model 'gpt', but 'a'"),
    "unknown character": ("completions", {"prompt": "to be Ω"}, 400, "the character 'Ω' (number 7 of the text)"),
    "empty prompt": ("completions", {"prompt": ""}, 400, "must not be empty without a memory"),
    "no prompts": ("completions", {"prompt": []}, 400, "prompt is an empty list"),
    "unsupported": ("completions", {"logprobs": 3}, 400, "logprobs: "),
    "long prompt": ("completions", {"prompt": "t" * 5001}, 400, "at most 5,000 are read at once"),
    "long prompts": ("completions", {"prompt": ["t" * 2501] * 2}, 400, "at most 5,000 are read at once"),
    "many tokens": ("completions", {"max_tokens": 4001}, 400, "at most 4000"),
    "many in all": ("completions", {"max_tokens": 1001, "n": 4}, 400, "4004 tokens to write"),
    "many choices": ("completions", {"n": 5}, 400, "5 choices; at most 4"),
    "hot": ("completions", {"temperature": 2.1}, 400, "temperature: "),
    "top_p": ("completions", {"top_p": 0}, 400, "top_p: "),
    "seed": ("completions", {"seed": 1 << 63}, 400, "seed: "),
    "stops": ("completions", {"stop": ["a"] * 5}, 400, "at most 4"),
    "empty stop": ("completions", {"stop": ""}, 400, "a stop must have"),
    "save several": ("completions", {"n": 2, "save_memory": "a"}, 400, "one prompt and n 1"),
    "no such memory": ("completions", {"memory": "nothing"}, 404, "there is no memory 'nothing'"),
    "long score": ("score", {"text": "t" * 5001}, 400, "at most 5,000"),
    "long body": ("completions", b" " * 30_001, 413, "more than 30,000 bytes"),
    "nothing to read": ("memories", {"name": "a", "text": ""}, 400, "text: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(client: Client, folder: Path, case: str) -> None:
    path, asked, expected, says = BAD[case]
    status, answer = client.ask("POST", f"/v1/{path}", asked)
    assert (status, answer.keys()) == (expected, {"error"})
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert says in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    status, _ = client.ask("POST", f"/v1/{path}", {"stream": True, **asked} if isinstance(asked, dict) else asked)
    assert status in (expected, 400)
    assert list(folder.iterdir()) == []


def test_fields_that_ask_for_nothing_are_let_through(client: Client) -> None:
    asked = {"echo": False, "best_of": 1, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0}
    text = client.text(prompt="to be", seed=1, **asked, logit_bias={}, suffix=None, user="someone", stop=None)
    assert text == client.text(prompt="to be", seed=1)
    assert len(text) == 16


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
        assert (status, "is there for localhost only" in answer["error"]["message"]) == (403, True), host
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST:1"):
        assert client.ask("GET", "/v1/models", host=host)[0] == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}", "http://[", "file://"):
        assert client.ask("POST", "/v1/score", {"text": "to be"}, origin=origin)[0] == 403, origin
    assert client.ask("POST", "/v1/score", {"text": "to be"}, origin=f"http://127.0.0.1:{port}")[0] == 200


def test_the_key(trained: Trained, folder: Path) -> None:
    with running(make_service(trained, folder), KEY_WITHOUT_SPACES, loopback=False) as client:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY_WITHOUT_SPACES}):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("DELETE", "/v1/memories/a")):
                with client.open(method, path, {} if method == "POST" else None, **given) as response:
                    assert response.status == 401
                    assert response.getheader("www-authenticate") == "Bearer"
                    assert json.loads(response.read())["error"]["code"] == "invalid_api_key"
        right = {"authorization": f"Bearer {KEY_WITHOUT_SPACES}"}
        assert client.ask("GET", "/v1/models", **right)[0] == 200
        assert client.ask("GET", "/v1/models", **right, host="model.example")[0] == 200
        assert client.ask("GET", "/v1/models", **right, host="model.example", origin="https://evil.example")[0] == 403
        assert client.ask("GET", "/")[0] == 200


def test_more_than_may_wait_are_told_to_come_back(trained: Trained, folder: Path) -> None:
    service = make_service(trained, folder, replace(LIMITS, running=1, waiting=1))
    go_on = threading.Event()

    def waits(_: ScoreAsked) -> Iterator[dict[str, Any]]:
        assert go_on.wait(30)
        yield {"done": True}

    service.score = waits  # type: ignore[method-assign, assignment]
    with running(service) as client, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.ask, "POST", "/v1/score", {"text": "to be"}) for _ in range(2)]
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
def test_who_goes_away_ends_the_work(trained: Trained, folder: Path, stream: bool) -> None:
    limits = replace(LIMITS, running=1, waiting=3, max_tokens=10**8)  # hours of writing
    with running(make_service(trained, folder, limits)) as client:
        body = json.dumps({"prompt": "to be", "max_tokens": 10**8, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        several = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(3)]
        for connection in several:
            connection.sendall(request)
        while client.workers.busy < 3:
            time.sleep(0.01)
        if stream:
            assert several[0].recv(100).startswith(b"HTTP/1.1 200")
        for connection in reversed(several):  # those that wait first
            connection.close()
        assert client.idle()
        assert len(client.text(prompt="to be", max_tokens=5)) == 5


def test_the_server_ends_while_it_writes(trained: Trained, folder: Path) -> None:
    with ExitStack() as after:
        with running(make_service(trained, folder, replace(LIMITS, max_tokens=10**8))) as client:
            asked = {"max_tokens": 10**8, "stream": True}
            response = after.enter_context(client.open("POST", "/v1/completions", asked))
            assert response.read(10)
        assert b"the server is being stopped" in response.read()


def test_too_many_memories(trained: Trained, folder: Path) -> None:
    with running(make_service(trained, folder, replace(LIMITS, memories=2))) as client:
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
    small = replace(LIMITS, memory_bytes=2 * (folder / "a.mem").stat().st_size + 10)
    with running(make_service(trained, folder, small)) as client:
        status, answer = client.ask("POST", "/v1/memories", {"name": "c", "text": "to be"})
        assert (status, "as much room as they may" in answer["error"]["message"]) == (409, True)
        client.good("POST", "/v1/memories", {"name": "b", "text": "to be or"})
    assert {path.name for path in folder.iterdir()} == {"a.mem", "b.mem"}


def test_random_requests_are_answered(client: Client) -> None:
    """Whatever is asked, the server does not fail."""
    choose = random.Random(0)
    fields = [*CompletionAsked.model_fields, "text", "name", "logprobs", "echo"]
    values = [None, True, 0, 1, -1, 2.5, 1e-320, 1e-38, 5e-7, 1e400, 10**30, "", "to be", "a", "../a", "\0", "ü", []]
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


def test_the_command(root: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-W", "error", "-m", "mmrec", "serve", f"--root={root}", "--port=0", "--memories=mems"]
    process = subprocess.Popen(
        [*args, "--limits.max_tokens=10000000"],
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


def test_what_the_command_refuses(mmrec: Command, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
            assert mmrec("serve", f"--root={root}", *args) == 2, args
            error = capsys.readouterr().err
            assert says in error
            assert error.count("\n") == 1
        for key in ("short", "with a space in it", "ü" * 20):
            patch.setenv("MMREC_API_KEY", key)
            assert mmrec("serve", f"--root={root}", "--port=0", "--host=0.0.0.0") == 2
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


# The page


def test_the_page_asks_nobody_else(client: Client) -> None:
    with client.open("GET", "/") as response:
        page, policy = response.read().decode(), response.getheader("content-security-policy", "")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", page)


@contextmanager
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; the page's policy forbids playwright's own way."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{condition}: {page.inner_text('body')}")


@pytest.mark.slow
def test_the_page_in_a_browser(trained: Trained, folder: Path, tmp_path: Path) -> None:
    service = make_service(trained, folder, replace(LIMITS, max_tokens=4096))
    with running(service, KEY_WITHOUT_SPACES) as client, browser() as chromium:
        page = chromium.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"http://localhost:{client.port}/")
        page.fill("#key", KEY_WITHOUT_SPACES)
        page.click("text=Unlock")
        page.wait_for_selector("#locked", state="hidden")
        problems.clear()  # the first request, without the key, was refused

        # Typing: each character has a colour, and says its bits.
        page.fill("#prompt", "to be or not")
        until(page, "document.querySelectorAll('#sheet span').length === 12")
        assert page.inner_text("#sheet") == "to be or not"
        classes = page.eval_on_selector_all("#sheet span", "found => found.map(span => span.className)")
        assert classes[0] == ""
        assert all(re.fullmatch(r"s[0-6]", name) for name in classes[1:])
        assert len(set(classes)) > 2
        page.hover("#sheet span:nth-child(3)")
        assert re.fullmatch(r'" " \d+\.\d\d bits', page.inner_text("#tip"))
        assert "bits per byte" in page.inner_text("#figures")

        # Writing.
        page.fill("#tokens", "40")
        page.fill("#seed", "1")
        page.click("#write")
        until(page, "document.querySelectorAll('#sheet .written').length === 40")
        written = page.eval_on_selector_all("#sheet .written", "found => found.map(s => s.textContent).join('')")
        alone = Client(client.port)
        key = {"authorization": f"Bearer {KEY_WITHOUT_SPACES}"}
        asked = {"prompt": "to be or not", "max_tokens": 40, "temperature": 0.8, "seed": 1}
        answer = alone.good("POST", "/v1/completions", asked, **key)
        assert written == answer["choices"][0]["text"]

        # A memory of all that, found again after a reload.
        page.fill("#name", "mine")
        page.click("#save")
        until(page, "document.getElementById('memory').value === 'mine'")
        assert "52 tokens read" in page.inner_text("#status")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "mine.mem")
        assert (tmp_path / "mine.mem").read_bytes() == (folder / "mine.mem").read_bytes()
        page.reload()
        page.wait_for_selector("#memory option[value=mine]", state="attached")
        page.select_option("#memory", "mine")
        page.fill("#prompt", "")
        page.fill("#seed", "2")
        page.fill("#tokens", "10")
        page.click("#write")
        until(page, "document.querySelectorAll('#sheet .written').length === 10")
        asked = {"memory": "mine", "max_tokens": 10, "temperature": 0.8, "seed": 2}
        answer = alone.good("POST", "/v1/completions", asked, **key)
        assert page.text_content("#sheet") == answer["choices"][0]["text"]

        # Stopping, a character that the model does not know, uploading, a text file, deleting.
        page.fill("#tokens", "4096")
        page.click("#write")
        until(page, "document.getElementById('sheet').textContent.length > 20")
        page.click("#stop")
        page.wait_for_selector("#write:enabled")
        assert client.idle()
        page.set_input_files("#memory-file", tmp_path / "mine.mem")
        until(page, "document.getElementById('status').textContent.startsWith('mine: ')")
        (tmp_path / "a text.txt").write_text("to be or not to be\n" * 20)
        page.set_input_files("#text-file", tmp_path / "a text.txt")
        page.wait_for_selector("#memory option[value=a-text]", state="attached")
        page.click("#delete")
        page.wait_for_selector("#memory option[value=a-text]", state="detached")
        assert {path.name for path in folder.iterdir()} == {"mine.mem"}
        assert problems == []
        page.fill("#prompt", "to Ω")
        page.wait_for_selector("#status.bad")
        assert "'Ω'" in page.inner_text("#status")
        assert page.inner_text("#sheet") == "to Ω"


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
