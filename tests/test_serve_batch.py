"""Requests that generate at the same time share the steps of the model, and each gets what it gets alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import LIMITS, Client, hold_scores, make_service, running
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.inference.batch import Batch, Row


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make steps slow, so that requests meet; return, as they are made, how many texts were in each."""
    found: list[int] = []
    step = Batch.step

    def slow_step(self: Batch, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        found.append(len(rows))
        time.sleep(0.002)
        return step(self, rows, tokens)

    monkeypatch.setattr(Batch, "step", slow_step)
    return found


ASKED: list[dict[str, Any]] = [
    {"prompt": "to be", "max_tokens": 40, "seed": 1},
    {"prompt": "that is", "max_tokens": 60, "seed": 2, "temperature": 0.5, "top_p": 0.9},
    {"prompt": "question", "max_tokens": 50, "seed": 3, "stop": [" ", "e"]},
    {"prompt": ["to be", "or not"], "max_tokens": 30, "seed": 4, "n": 2},
    {"prompt": "to be", "max_tokens": 45, "temperature": 0, "logprobs": 2},
    {"prompt": "not to", "max_tokens": 25, "seed": 5, "top_k": 3, "echo": True},
    {"prompt": "be", "max_tokens": 1, "seed": 6},
]


def test_a_text_does_not_depend_on_who_else_writes(client: Client, sizes: list[int]) -> None:
    alone = [client.complete(**asked)["choices"] for asked in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        streams = pool.submit(client.stream, **ASKED[0])
        together = [*pool.map(lambda asked: client.complete(**asked)["choices"], ASKED)]
    assert together == alone
    assert "".join(event["choices"][0]["text"] for event in streams.result()) == alone[0][0]["text"]
    assert max(sizes) > 4


def test_the_choices_of_a_request_are_written_together(
    small_model: LoadedModel, memories: Path, sizes: list[int]
) -> None:
    with running(make_service(small_model, memories, replace(LIMITS, batch=3))) as client:
        events = client.stream(prompt="to be", n=4, seed=1, max_tokens=5)
        assert sizes == [3] * 4 + [1] * 4
        texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in range(4)]
        assert texts == [client.text(prompt="to be", seed=1 + i, max_tokens=5) for i in range(4)]
        sizes.clear()
        with ThreadPoolExecutor(5) as pool:
            assert len([*pool.map(lambda seed: client.text(prompt="to be", seed=seed, max_tokens=20), range(5))]) == 5
        assert max(sizes) <= 3


def test_one_that_reads_or_fails_holds_up_no_other(
    small_model: LoadedModel, memories: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    service = make_service(small_model, memories, replace(LIMITS, running=1, memories=1))
    go_on = hold_scores(service)
    with running(service) as client, ThreadPoolExecutor(3) as pool:
        client.good("POST", "/v1/memories", {"name": "a", "text": "to be"})
        writing = pool.submit(client.text, prompt="to be", max_tokens=200)
        while not sizes:
            time.sleep(0.01)
        reading = pool.submit(client.ask, "POST", "/v1/score", {"text": "to be"})
        assert len(writing.result()) == 200
        go_on.set()
        assert reading.result() == (200, {"done": True})
        writing = pool.submit(client.text, prompt="to be", max_tokens=200)
        asked = {"prompt": "to be", "max_tokens": 3, "save_memory": "b"}
        assert client.ask("POST", "/v1/completions", asked)[0] == 409
        assert len(writing.result()) == 200

        def broken(*_: object) -> Tensor:
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", broken)
            assert client.ask("POST", "/v1/completions", {"prompt": "to be"})[0] == 500
        assert client.idle()
        assert len(client.text(prompt="to be", max_tokens=5)) == 5
