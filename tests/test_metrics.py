"""The score of a text is a sum over its tokens, however it is cut."""

from __future__ import annotations

import math

import pytest
import torch

from mmrec.inference.metrics import MetricsByPosition, TextMetrics


def test_the_figures_are_those_of_the_definitions() -> None:
    score = TextMetrics()
    score.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1, 1], [2, 1], [3, 2]]))
    result = {name: float(value) for name, value in score.compute().items()}
    assert result["loss"] == 2.0
    assert math.isclose(result["perplexity"], math.exp(2))
    assert math.isclose(result["bits_per_byte"], 6 / math.log(2) / 6)
    assert math.isclose(result["nats_per_char"], 6 / 4)


def test_cutting_the_text_does_not_change_them() -> None:
    nats, lengths = torch.rand(1000), torch.randint(1, 4, (1000, 2))
    whole, parts = TextMetrics(), TextMetrics()
    whole.update(nats, lengths)
    for a, b in zip(nats.split(7), lengths.split(7), strict=True):
        parts.update(a, b)
    for name, value in whole.compute().items():
        assert math.isclose(float(value), float(parts.compute()[name]), rel_tol=1e-6)


def test_a_million_small_terms_lose_nothing() -> None:
    score = TextMetrics()
    for _ in range(100):
        score.update(torch.full((10_000,), 0.1), torch.ones(10_000, 2))
    assert math.isclose(float(score.compute()["loss"]), 0.1, rel_tol=1e-7)


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_positions_are_in_their_bands(size: int) -> None:
    nats, lengths = torch.rand(5000), torch.randint(1, 4, (5000, 2))
    score = MetricsByPosition()
    for first in range(0, 5000, size):
        score.update(nats[first : first + size], lengths[first : first + size], 100 + first)
    bands = score.compute()
    assert list(bands) == [0, 1024, 2048, 4096]
    edges = [0, 924, 1948, 3996, 5000]
    for band, first, last in zip(bands.values(), edges, edges[1:], strict=False):
        assert int(band.tokens) == last - first
        assert float(band.compute()["loss"]) == pytest.approx(float(nats[first:last].mean()), rel=1e-5)
        assert int(band.bytes) == int(lengths[first:last, 0].sum())


def test_a_band_without_tokens_is_left_out() -> None:
    score = MetricsByPosition()
    score.update(torch.rand(10), torch.ones(10, 2), 1 << 20)
    assert list(score.compute()) == [1 << 20]
    assert MetricsByPosition().compute() == {}
