"""The score of a text is a sum over its tokens, however it is cut."""

from __future__ import annotations

import math

import torch

from mmrec.metrics import TextScore


def test_the_figures_are_those_of_the_definitions() -> None:
    score = TextScore()
    score.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1, 1], [2, 1], [3, 2]]))
    result = {name: float(value) for name, value in score.compute().items()}
    assert result["loss"] == 2.0
    assert math.isclose(result["perplexity"], math.exp(2))
    assert math.isclose(result["bits_per_byte"], 6 / math.log(2) / 6)
    assert math.isclose(result["nats_per_char"], 6 / 4)


def test_cutting_the_text_does_not_change_them() -> None:
    nats, lengths = torch.rand(1000), torch.randint(1, 4, (1000, 2))
    whole, parts = TextScore(), TextScore()
    whole.update(nats, lengths)
    for a, b in zip(nats.split(7), lengths.split(7), strict=True):
        parts.update(a, b)
    for name, value in whole.compute().items():
        assert math.isclose(float(value), float(parts.compute()[name]), rel_tol=1e-6)


def test_a_million_small_terms_lose_nothing() -> None:
    score = TextScore()
    for _ in range(100):
        score.update(torch.full((10_000,), 0.1), torch.ones(10_000, 2))
    assert math.isclose(float(score.compute()["loss"]), 0.1, rel_tol=1e-7)
