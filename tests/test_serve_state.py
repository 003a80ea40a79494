"""A conversation in parts: the turns joined are the text at once, also where a turn ends inside a character."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Client, make_service, running

from mmrec import MemoryLM
from mmrec.checkpoints.checksummed import write_checksummed
from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import FORMAT, SavedState, _tensors, load_memory, model_hash, save_memory
from mmrec.core.errors import UserError
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.serve import state_store
from mmrec.serve.logprobs import token_names
from mmrec.tokenizers import BPETokenizer, ByteTokenizer, StreamDecoder, Tokenizer, pending_bytes

TEXT = "春ö🎉\u0131はa"
"""Japanese, Turkish and an emoji: characters of one to four bytes, in which no byte is met twice."""
TURNS = 6


def make_tokenizer(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "bytes" else BPETokenizer.train([TEXT * 50], 258)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def fluent(request: pytest.FixtureRequest) -> LoadedModel:
    """A model that writes :data:`TEXT` again and again: after each token comes the one that follows it there."""
    tokenizer = make_tokenizer(request.param)
    torch.manual_seed(0)
    config = ModelConfig(dim=264, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=8, tie_embeddings=False)
    net = RecurrentLM(config, tokenizer.vocab_size)
    cycle = tokenizer.encode(TEXT).tolist()
    assert len(set(cycle)) == len(cycle)
    with torch.no_grad():
        for name, weight in net.blocks.named_parameters():
            if name.endswith("output.weight"):
                weight.zero_()  # what is read changes the state, and nothing that is written
        net.embedding.weight.copy_(torch.eye(tokenizer.vocab_size, config.dim))
        net.head.weight.zero_()
        for token, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            net.head.weight[following, token] = 1.0
    return LoadedModel(net.eval(), tokenizer, 0)


@pytest.mark.parametrize("per_turn", [1, 4, 5])
def test_turns_joined_are_the_text_at_once(fluent: LoadedModel, memories: Path, per_turn: int) -> None:
    with running(make_service(fluent, memories)) as client:
        whole = client.text(prompt=TEXT, max_tokens=per_turn * TURNS, temperature=0)
        texts = [client.text(prompt=TEXT, max_tokens=per_turn, temperature=0, save_memory="m")]
        for turn in range(1, TURNS):
            saved = {} if turn == TURNS - 1 else {"save_memory": "m"}
            texts.append(client.text(max_tokens=per_turn, temperature=0, memory="m", **saved))
        assert "\ufffd" not in "".join(texts[:-1])
        assert "".join(texts) == whole
        streamed = client.stream(prompt=TEXT, max_tokens=per_turn, temperature=0, save_memory="s")
        assert "".join(event["choices"][0]["text"] for event in streamed) == texts[0]


@pytest.mark.parametrize("per_turn", [1, 4])
def test_tokens_of_turns_joined_are_those_of_the_text_at_once(
    fluent: LoadedModel, memories: Path, per_turn: int
) -> None:
    """Each has its log probability once, also those of a character that a turn ends inside of."""
    asked = {"temperature": 0, "logprobs": 0}
    with running(make_service(fluent, memories)) as client:
        (whole,) = client.complete(prompt=TEXT, max_tokens=per_turn * TURNS, **asked)["choices"]
        tokens: list[str] = []
        for turn in range(TURNS):
            on = {"memory": "m"} if turn else {"prompt": TEXT}
            (choice,) = client.complete(**asked, **on, max_tokens=per_turn, save_memory="m")["choices"]
            assert len(choice["logprobs"]["tokens"]) == per_turn
            assert max(choice["logprobs"]["text_offset"]) <= len(choice["text"])
            tokens += choice["logprobs"]["tokens"]
        assert tokens == whole["logprobs"]["tokens"]
        streamed = client.stream(prompt=TEXT, max_tokens=per_turn, save_memory="s", **asked)
        parts = [event["choices"][0]["logprobs"]["tokens"] for event in streamed]
        assert [token for part in parts for token in part] == tokens[:per_turn]


def test_a_prompt_that_is_given_back_may_end_inside_a_character(fluent: LoadedModel, memories: Path) -> None:
    tokenizer = fluent.tokenizer
    tokens = tokenizer.encode(TEXT * 2).tolist()
    names = token_names(tokenizer)
    spelled = [names[token] for token in tokens]
    asked = {"temperature": 0, "logprobs": 0, "echo": True}
    with running(make_service(fluent, memories)) as client:
        for cut in range(1, len(tokens) // 2):
            more = len(tokens) - cut
            (whole,) = client.complete(prompt=tokens[:cut], max_tokens=more, **asked)["choices"]
            assert whole["text"] == TEXT * 2
            assert whole["logprobs"]["tokens"] == spelled
            # In two turns: the second is given no text, or the rest of the character as tokens.
            (first,) = client.complete(prompt=tokens[:cut], max_tokens=0, save_memory="half", **asked)["choices"]
            for given in ({}, {"prompt": tokens[cut : cut + 1]}):
                rest = more - len(given.get("prompt", []))
                (second,) = client.complete(memory="half", max_tokens=rest, **given, **asked)["choices"]
                assert first["text"] + second["text"] == TEXT * 2
                assert first["logprobs"]["tokens"] + second["logprobs"]["tokens"] == spelled
        # As in every case, several choices share the prompt.
        (_, again) = client.complete(prompt=tokens[:1], max_tokens=len(tokens) - 1, n=2, **asked)["choices"]
        assert again["text"] == TEXT * 2


def half_a_character(client: Client) -> str:
    """Save a memory "half" that ends inside a character; return the text that it passed on."""
    for tokens in range(2, 40):
        text = client.text(prompt=TEXT, max_tokens=tokens, temperature=0, save_memory="half")
        shown = client.text(prompt=TEXT, max_tokens=tokens, temperature=0)
        if shown.endswith("\ufffd"):
            assert shown == text + "\ufffd"
            return text
    raise AssertionError("no turn ended inside a character")


def test_half_a_character_is_carried_by_the_file(fluent: LoadedModel, memories: Path) -> None:
    digest = model_hash(fluent.net, fluent.tokenizer)
    with running(make_service(fluent, memories)) as client:
        text = half_a_character(client)
        state = load_memory(memories / "half.mem", fluent.net, digest)
        assert 1 <= len(state.pending) <= 3
        whole = client.text(prompt=TEXT, max_tokens=60, temperature=0)
        following = client.text(memory="half", max_tokens=10, temperature=0)
        assert whole.startswith(text + following.removesuffix("\ufffd"))
        assert following[0].encode().startswith(state.pending)

        # The Python API goes on with the half, as the server and the command do.
        model = MemoryLM(fluent)
        model.load_memory(memories / "half.mem")
        assert model.generate(length=10, temperature=0) == following
        # What is uploaded is checked as well.
        uploaded = (memories / "half.mem").read_bytes()
        kind = "application/octet-stream"
        client.good("PUT", "/v1/memories/again/file", uploaded, content_type=kind)
        assert client.text(memory="again", max_tokens=10, temperature=0) == following
        # A prompt begins a character of its own: nothing of the half is in the answer.
        assert not client.text(memory="half", prompt=TEXT, max_tokens=3, temperature=0).startswith("\ufffd")


def test_a_stop_after_half_a_character(fluent: LoadedModel, memories: Path) -> None:
    with running(make_service(fluent, memories)) as client:
        half_a_character(client)
        following = client.text(memory="half", max_tokens=12, temperature=0)
        asked = {"memory": "half", "max_tokens": 12, "temperature": 0, "stop": following[1]}
        assert client.text(**asked, save_memory="stopped") == following[:1]
        digest = model_hash(fluent.net, fluent.tokenizer)
        half, stopped = (load_memory(memories / f"{name}.mem", fluent.net, digest) for name in ("half", "stopped"))
        missing = len(following[0].encode()) - len(half.pending)
        assert stopped.pending == b""
        assert 1 <= stopped.position - half.position <= missing


def test_a_stop_after_half_a_character_that_nothing_completed(fluent: LoadedModel, memories: Path) -> None:
    """What was passed on for it, U+FFFD, is not completed by the next turn."""
    (begin,), (following,) = fluent.tokenizer.encode("\u6625")[:1].tolist(), fluent.tokenizer.encode("a").tolist()
    net = deepcopy(fluent.net)
    with torch.no_grad():
        net.head.weight[:, begin] = 0.0
        net.head.weight[following, begin] = 1.0
    service = make_service(LoadedModel(net, fluent.tokenizer, 0), memories)
    with running(service) as client:
        asked = {"prompt": [begin], "max_tokens": 5, "temperature": 0}
        assert client.text(**asked).startswith("\ufffda")
        assert client.text(**asked, stop="a", save_memory="stopped") == "\ufffd"
    assert service.memories.load("stopped").pending == b""


def test_a_memory_with_bytes_of_no_character_is_refused(fluent: LoadedModel, tmp_path: Path) -> None:
    digest = model_hash(fluent.net, fluent.tokenizer)
    state = SavedState.empty(fluent.net)
    for pending in (b"a", b"\xc3\xbc", b"\xff", b"\xbc", b"\xf0\x9f\x98\x80"):
        metadata = {"model": digest, "position": "3", "pending": pending.hex()}
        write_checksummed(tmp_path / "bad.mem", FORMAT, _tensors(state), metadata)
        with pytest.raises(UserError, match="bytes that begin no character"):
            load_memory(tmp_path / "bad.mem", fluent.net, digest)
    save_memory(tmp_path / "good.mem", replace(state, pending=b"\xf0\x9f", position=2), digest)
    assert load_memory(tmp_path / "good.mem", fluent.net, digest).pending == b"\xf0\x9f"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pending_bytes_are_those_of_a_decoder(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    tokens = tokenizer.encode(TEXT * 2).tolist()
    decoder, pending = StreamDecoder(tokenizer), b""
    for count, token in enumerate(tokens, 1):
        decoder.push(token)
        pending = pending_bytes(tokenizer, pending, [token])
        assert pending == decoder.pending == pending_bytes(tokenizer, b"", tokens[:count])


def test_an_upload_is_checked_before_anything_is_written(
    small_model: LoadedModel, memories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed in between leaves nothing behind."""
    found: list[list[Path]] = []

    def load(*args: Any) -> SavedState:
        found.append([*memories.iterdir()])
        return load_memory(*args)

    monkeypatch.setattr(state_store, "load_memory", load)
    path = tmp_path / "a.mem"
    save_memory(path, SavedState.empty(small_model.net), model_hash(small_model.net, small_model.tokenizer))
    with running(make_service(small_model, memories)) as client:
        client.good("PUT", "/v1/memories/a/file", path.read_bytes(), content_type="application/octet-stream")
    assert found == [[]]


def test_a_file_in_memory_is_read_as_one_on_the_disk(small_model: LoadedModel, tmp_path: Path) -> None:
    model = model_hash(small_model.net, small_model.tokenizer)
    path = tmp_path / "a.mem"
    save_memory(path, SavedState.empty(small_model.net), model)
    good, choose = path.read_bytes(), random.Random(0)
    reference = load_memory(path, small_model.net, model)
    loaded = load_memory(Path("unread"), small_model.net, model, good)
    assert torch.equal(loaded.logits, reference.logits)
    head = 8 + int.from_bytes(good[:8], "little")
    for _ in range(200):
        data = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            data[choose.randrange(head)] = choose.randrange(256)
        path.write_bytes(data[: choose.choice([len(data), choose.randrange(len(data))])])
        with pytest.raises(UserError):
            load_memory(path, small_model.net, model)
        with pytest.raises(UserError):
            load_memory(path, small_model.net, model, path.read_bytes())
