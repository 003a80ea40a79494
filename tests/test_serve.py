"""The server: real requests to a real one on loopback, and what they get is what the commands give."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_text
from safetensors.torch import save
from serving import Client, events, make_service

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import FORMAT, SavedState, load_memory, model_hash, save_memory
from mmrec.cli import main
from mmrec.inference.generate import generate_tokens
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.serve.protocol import CompletionRequest, ScoreRequest
from mmrec.serve.service import Finished, Service, TextChunk
from mmrec.serve.transcript import StopFinder
from mmrec.tokenizers import ByteTokenizer


def of_bytes(memories: Path) -> Service:
    torch.manual_seed(0)
    config = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)
    return make_service(LoadedModel(RecurrentLM(config, 256).eval(), ByteTokenizer(), 0), memories)


def opened(small_model: LoadedModel, path: Path) -> SavedState:
    return load_memory(path, small_model.net, model_hash(small_model.net, small_model.tokenizer))


def assert_same(one: SavedState, other: SavedState) -> None:
    assert one.position == other.position
    torch.testing.assert_close([one.logits, *one.state], [other.logits, *other.state], rtol=1e-4, atol=1e-4)


# Writing


def test_models(client: Client) -> None:
    answer = client.good("GET", "/v1/models")
    assert [(model["id"], model["object"]) for model in answer["data"]] == [("a", "model")]


def test_it_writes_what_generate_writes(client: Client, small_root: Path) -> None:
    shown = io.StringIO()
    options = ["--prompt=to be", "--length=80", "--temperature=0.7", "--top_p=0.9", "--seed=3"]
    with redirect_stdout(shown):
        assert main(["generate", f"--root={small_root}", *options]) == 0
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


def test_pieces_are_whole_characters(memories: Path) -> None:
    service, text = of_bytes(memories), "Çay, üç şişe, öğle çorbas\u0131… 😀"
    *_, score = service.score(ScoreRequest(text=text))
    assert score is not None
    assert score["pieces"]["text"] == list(text)
    assert score["tokens"] == len(text.encode()) - 1
    assert sum(score["pieces"]["nats"]) == pytest.approx(score["nats"], abs=1e-3)

    asked = CompletionRequest(prompt=text, max_tokens=300, seed=0)
    written = list(events(service, asked))
    pieces = [event.text for event in written if isinstance(event, TextChunk)]
    (ended,) = (event for event in written if isinstance(event, Finished))
    assert ended.tokens == 300
    # A model of random weights writes bytes at random; some of them are characters of several bytes.
    prompt = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    drawn = bytes(generate_tokens(service._net, prompt, SamplingOptions(300, 1.0)))
    assert "".join(pieces) == drawn.decode("utf-8", errors="replace")
    assert any(len(piece.encode()) > 1 and "\ufffd" not in piece for piece in pieces)


# StateStore


def test_going_on_from_a_memory(
    client: Client, memories: Path, small_root: Path, small_model: LoadedModel, tmp_path: Path
) -> None:
    text = make_text()
    kept = client.good("POST", "/v1/memories", {"name": "book", "text": text[:3000]})
    assert (kept["id"], kept["position"], kept["usable"]) == ("book", 3000, True)
    more = client.good("POST", "/v1/memories", {"name": "more", "text": text[3000:4000], "memory": "book"})
    assert more["position"] == 4000
    whole = client.text(prompt=text[:4000], max_tokens=60, seed=1)
    assert client.text(memory="more", max_tokens=60, seed=1) == whole
    assert client.text(memory="book", prompt=text[3000:4000], max_tokens=60, seed=1) == whole

    book, saved = tmp_path / "book.txt", tmp_path / "book.mem"
    book.write_text(text[:3000])
    assert main(["read", str(book), f"--save={saved}", f"--root={small_root}"]) == 0
    assert_same(opened(small_model, memories / "book.mem"), opened(small_model, saved))


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


def test_memories_go_in_and_out(client: Client, small_model: LoadedModel, tmp_path: Path) -> None:
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
    assert_same(opened(small_model, tmp_path / "x.mem"), opened(small_model, tmp_path / "copy.mem"))
    assert client.text(memory="copy", max_tokens=20, seed=1) == client.text(memory="a", max_tokens=20, seed=1)
    assert client.good("DELETE", "/v1/memories/a")["deleted"] is True
    for method, path in (("DELETE", "a"), ("GET", "a"), ("GET", "a/file")):
        status, answer = client.ask(method, f"/v1/memories/{path}")
        assert (status, answer["error"]["code"]) == (404, "memory_not_found")
    assert [memory["id"] for memory in client.good("GET", "/v1/memories")["data"]] == ["b", "copy"]


BAD_NAMES = ["../a", "a/b", "", ".a", "a.mem", "-a", "a" * 65, "ä", "a\n", "a\0", "..", "con fig"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(client: Client, memories: Path, name: str) -> None:
    for path, asked in (
        ("/v1/memories", {"name": name, "text": "to be"}),
        ("/v1/completions", {"prompt": "to be", "memory": name}),
        ("/v1/completions", {"prompt": "to be", "save_memory": name}),
        ("/v1/score", {"text": "to be", "memory": name}),
    ):
        status, answer = client.ask("POST", path, asked)
        assert status == 400
        assert "is no name of a memory" in answer["error"]["message"]
    assert list(memories.iterdir()) == []
    assert {path.name for path in memories.parent.iterdir()} == {"memories"}


def test_names_in_a_path(client: Client, memories: Path) -> None:
    (memories.parent / "secret.mem").write_bytes(b"secret")
    for name in ("..%2Fsecret", "%2e%2e%2fsecret", "../secret", "..", ".", "%00", "a%0a"):
        for method, path in (("GET", f"{name}/file"), ("GET", name), ("DELETE", name)):
            status, _ = client.ask(method, f"/v1/memories/{path}")
            assert status in (400, 404, 405)
    assert (memories.parent / "secret.mem").read_bytes() == b"secret"


def test_bad_uploads(client: Client, memories: Path, small_model: LoadedModel, tmp_path: Path) -> None:
    model = model_hash(small_model.net, small_model.tokenizer)
    empty = SavedState.empty(small_model.net)
    path = tmp_path / "x.mem"

    def saved(memory: SavedState, of: str = model) -> bytes:
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
        (saved(SavedState(empty.state[1:], empty.logits, 3)), "does not hold what a memory of this model does"),
        (saved(SavedState([(past, inner[:, :1]), *others], empty.logits, 3)), "does not hold"),
        (save({"logits": empty.logits.bfloat16()}, {"format": FORMAT.format, "version": FORMAT.version}), "damaged"),
        (saved(SavedState([(past, inner + torch.nan), *others], empty.logits, 3)), "not finite"),
        (saved(SavedState([(past, inner + 1e38), *others], empty.logits, 3)), "larger than reading ever makes them"),
        (saved(SavedState(empty.state, empty.logits + 1e38, 3)), "larger than reading ever makes them"),
    ):
        status, answer = client.ask("PUT", "/v1/memories/a/file", data, content_type="application/octet-stream")
        assert status == 400, says
        assert says in answer["error"]["message"]
        assert str(memories) not in answer["error"]["message"]
        assert list(memories.iterdir()) == []
    status, _ = client.ask("PUT", "/v1/memories/a/file", b"x" * 1_500_000, content_type="application/octet-stream")
    assert status == 413


def test_a_damaged_or_foreign_file_in_the_folder(client: Client, memories: Path, small_model: LoadedModel) -> None:
    (memories / "bad.mem").write_bytes(b"nothing")
    save_memory(memories / "other.mem", SavedState.empty(small_model.net), "another")
    assert [(m["id"], m["usable"]) for m in client.good("GET", "/v1/memories")["data"]] == [("other", False)]
    for name in ("bad", "other"):
        status, answer = client.ask("POST", "/v1/completions", {"memory": name})
        assert status == 400
        assert answer["error"]["message"].startswith(f"{name}: ")


def test_users_do_not_meet(client: Client, memories: Path) -> None:
    """Many at a time, each with a memory of its own: each gets what it gets alone, and no memory changes."""
    text = make_text()
    for user in range(6):
        client.good("POST", "/v1/memories", {"name": f"user{user}", "text": text[user * 1500 : user * 1500 + 1000]})
    before = {path.name: path.read_bytes() for path in memories.iterdir()}

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
    assert {path.name: path.read_bytes() for path in memories.iterdir()} == before
    assert client.idle()


def test_saving_under_one_name_at_the_same_time(client: Client, memories: Path) -> None:
    def save(user: int) -> Any:
        return client.good("POST", "/v1/memories", {"name": "one", "text": "to be " * (user + 1)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(16)))
    assert client.good("GET", "/v1/memories/one")["position"] in {6 * (user + 1) for user in range(16)}
    assert client.text(memory="one", max_tokens=5)
    assert [path.name for path in memories.iterdir()] == ["one.mem"]


# Scores


def test_score_is_that_of_the_command(
    client: Client, small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = make_text()[:3000]
    scored, table = tmp_path / "scored.txt", tmp_path / "costs.tsv"
    scored.write_text(text)
    assert main(["score", str(scored), f"--root={small_root}", f"--token_nll={table}"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    answer = client.good("POST", "/v1/score", {"text": text})
    assert answer["tokens"] == 2999
    assert f"{answer['nats_per_token']:.4f} nats/token" in line
    assert f"{answer['bits_per_byte']:.4f} bits/byte" in line
    costs = [float(row.split("\t")[2]) for row in table.read_text().splitlines()[1:]]
    assert "".join(answer["pieces"]["text"]) == text
    assert answer["pieces"]["nats"][0] is None
    assert [nats or 0 for nats in answer["pieces"]["nats"]] == pytest.approx(costs, abs=1e-4)
    client.good("POST", "/v1/memories", {"name": "begin", "text": text[:2000]})
    end = client.good("POST", "/v1/score", {"text": text[2000:], "memory": "begin"})
    assert end["pieces"]["nats"] == pytest.approx(costs[2000:], abs=1e-3)
