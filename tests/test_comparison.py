"""What stands beside the score at the end of mmrec train: PPMd, and the model with a memory that learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmrec.checkpoints.learned import PART
from mmrec.checkpoints.loading import LoadedModel
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.inference.compressors import ppmd_sizes
from mmrec.planning.comparison import (
    bits_per_byte,
    carried_nll,
    compare,
    comparison_seconds,
)
from mmrec.planning.outcome import _ppmd, _with_memory


@pytest.fixture
def folder(prepared: Path) -> TokenFolder:
    return open_tokens(prepared)


def test_all_of_a_short_text_is_compared(small_model: LoadedModel, folder: TokenFolder) -> None:
    nll = carried_nll(small_model, folder)
    assert len(nll) == len(folder.val)
    beside = compare(small_model, folder, nll, 600)
    assert beside is not None
    assert beside.tokens == len(folder.val)
    assert beside.state == bits_per_byte(nll, folder)
    assert 0 < beside.memory < beside.state
    train, val = (bytes(map(ord, folder.tokenizer.decode(part.tolist()))) for part in (folder.train, folder.val))
    sizes = ppmd_sizes([train, val])
    assert sizes is not None
    assert beside.ppmd == 8 * (sizes[1] - sizes[0]) / len(val)
    assert f"{beside.ppmd:.3f} by PPMd" in _ppmd(beside, len(nll))
    assert len(_with_memory(beside, len(nll))) == 1


def test_what_is_compared_is_bounded_by_the_time(small_model: LoadedModel, folder: TokenFolder) -> None:
    nll = carried_nll(small_model, folder)
    beside = compare(small_model, folder, nll, 1e-6)
    assert beside is not None
    assert beside.tokens == PART
    assert beside.state == bits_per_byte(nll[:PART], folder)
    assert _ppmd(beside, len(nll)) == ""
    lines = _with_memory(beside, len(nll))
    assert f"{beside.memory:.3f} bits/byte on the first {PART} tokens" in lines[0]
    assert f"{beside.state:.3f} without" in lines[1]
    assert comparison_seconds(2) == 6
    assert comparison_seconds(10_000) == 60


def test_bits_per_byte_count_the_bytes_of_what_is_scored(folder: TokenFolder) -> None:
    import torch

    nll = torch.full((len(folder.val),), float(np.log(2)))
    nll[0] = 0
    assert bits_per_byte(nll, folder) == pytest.approx(1.0)


def test_without_pyppmd_the_rest_is_said(
    small_model: LoadedModel, folder: TokenFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec.inference.compressors.find_spec", lambda name: None)
    nll = carried_nll(small_model, folder)[: 2 * PART]
    beside = compare(small_model, folder, nll, 600)
    assert beside is not None
    assert beside.ppmd is None
    assert _ppmd(beside, len(nll)) == ""
