"""Learned memories on a server: made by ``learn``, side by side, each with its own weights; others are as before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from serving import Client

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState, _tensors, load_memory, model_hash
from mmrec.inference.reading import Reader


def read(client: Client, name: str, text: str, **more: Any) -> Any:
    return client.good("POST", "/v1/memories", {"name": name, "text": text, **more})


def nats(client: Client, text: str, memory: str | None = None) -> float:
    return float(client.good("POST", "/v1/score", {"text": text, "memory": memory})["nats"])


def test_a_memory_learns_and_others_do_not(
    client: Client, memories: Path, small_model: LoadedModel, text: str
) -> None:
    foreign, rest = "question the or " * 100, "question the or " * 10
    plain_before = nats(client, text[:300])
    kept = read(client, "learned", foreign[:700], learn=True)
    assert kept["learned"] == "full"
    # A memory that learned goes on learning, and is the same as by reading at once.
    assert read(client, "learned", foreign[700:], memory="learned")["learned"] == "full"
    reader = Reader(small_model.net, SavedState.empty(small_model.net).learning(small_model.net))
    for _ in reader.read(small_model.tokenizer.encode(foreign)):
        pass
    model = model_hash(small_model.net, small_model.tokenizer)
    mine = _tensors(load_memory(memories / "learned.mem", small_model.net, model))
    assert all(bool((mine[name] == tensor).all()) for name, tensor in _tensors(reader.memory).items())
    assert read(client, "small", foreign, form="small")["learned"] == "small"
    assert read(client, "plain", foreign)["learned"] is None
    costs = {name: nats(client, rest, name) for name in ("plain", "small", "learned")}
    assert costs["learned"] < costs["plain"]
    assert costs["small"] < costs["plain"]
    assert nats(client, text[:300]) == plain_before
    assert [memory["learned"] for memory in client.good("GET", "/v1/memories")["data"]] == ["full", None, "small"]
    before = (memories / "learned.mem").read_bytes()
    assert client.text(memory="learned", prompt="", max_tokens=20, temperature=0)
    assert (memories / "learned.mem").read_bytes() == before
    assert client.text(memory="learned", prompt="or ", max_tokens=5, save_memory="turn")
    assert client.good("GET", "/v1/memories/turn")["learned"] == "full"
    status, answer = client.ask("POST", "/v1/memories", {"name": "x", "text": "a", "memory": "small", "form": "full"})
    assert status == 400
    assert "learns in the form small, not full" in answer["error"]["message"]


def test_a_learned_memory_is_uploaded(client: Client, text: str) -> None:
    read(client, "one", text[:400], learn=True)
    data = client.good("GET", "/v1/memories/one/file")
    copied = client.good("PUT", "/v1/memories/two/file", data, content_type="application/octet-stream")
    assert copied["learned"] == "full"
    assert nats(client, text[400:500], "one") == nats(client, text[400:500], "two")


def test_learned_memories_side_by_side(client: Client, text: str) -> None:
    """Two that are read at the same time are as those that are read one after the other."""
    texts = {"a": text[:600], "b": "question the or " * 40}
    for name, part in texts.items():
        read(client, name, part, learn=True)
    threads = [
        threading.Thread(target=read, args=(client, f"{name}2", part), kwargs={"learn": True})
        for name, part in texts.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in texts:
        assert nats(client, text[600:700], name) == nats(client, text[600:700], f"{name}2")
