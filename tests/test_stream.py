"""The order of training: every token once an epoch, rows that continue, any place reached by its number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.errors import UserError
from mmrec.stream import IGNORE, RowLoader, RowStream, TextLoader


def stream(total: int, rows: int, length: int, **options: int | float) -> RowStream:
    return RowStream(np.arange(total, dtype=np.uint32), rows, length, **options)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(30, 400),
    rows=st.integers(1, 4),
    world=st.integers(1, 3),
    length=st.integers(1, 29),
    epoch=st.integers(0, 2),
)
def test_every_token_is_predicted_once_an_epoch(total: int, rows: int, world: int, length: int, epoch: int) -> None:
    predicted: list[int] = []
    for rank in range(world):
        one = stream(total, rows, length, rank=rank, world_size=world)
        for number in range(epoch * len(one), (epoch + 1) * len(one)):
            batch = one.batch(number)
            assert 1 <= batch.inputs.shape[1] <= length
            scored = batch.targets != IGNORE
            # What is predicted is the token after the one that is read.
            assert ((batch.inputs[scored] + 1) % total == batch.targets[scored]).all()
            predicted += batch.targets[scored].tolist()
    assert sorted(predicted) == list(range(total))


def test_rows_continue_from_batch_to_batch() -> None:
    one = stream(1000, 3, 50)
    for number in range(len(one) - 1):
        assert torch.equal(one.batch(number).targets[:, -1], one.batch(number + 1).inputs[:, 0])


def test_batches_of_an_epoch_are_of_nearly_equal_length() -> None:
    one = stream(1003, 4, 50)
    assert {one.batch(n).inputs.shape[1] for n in range(len(one))} == {41, 42}


def test_each_epoch_cuts_the_text_elsewhere() -> None:
    one = stream(1000, 2, 50)
    firsts = {int(one.batch(epoch * len(one)).inputs[0, 0]) for epoch in range(5)}
    assert len(firsts) == 5


def test_resets_are_as_frequent_as_asked_and_rows_begin_an_epoch_fresh() -> None:
    one = stream(40_000, 4, 10, reset_probability=0.1)
    assert one.batch(len(one)).fresh.all()
    share = torch.stack([one.batch(n).fresh for n in range(1, len(one))]).float().mean()
    assert 0.08 < share < 0.12
    never = stream(4000, 4, 10, reset_probability=0.0)
    assert not any(never.batch(n).fresh.any() for n in range(1, len(never)))


def test_the_seed_decides() -> None:
    assert torch.equal(stream(500, 2, 20, seed=1).batch(7).inputs, stream(500, 2, 20, seed=1).batch(7).inputs)
    assert not torch.equal(stream(500, 2, 20, seed=1).batch(7).inputs, stream(500, 2, 20, seed=2).batch(7).inputs)


@settings(max_examples=50, deadline=None)
@given(stop=st.integers(0, 60))
def test_a_loader_goes_on_where_its_state_says(stop: int) -> None:
    one = stream(600, 2, 15)
    whole = RowLoader(one)
    expected = [batch for _ in range(3) for batch in whole]
    first, seen = RowLoader(one), []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
    second = RowLoader(one)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen.extend(second)
    for a, b in zip(seen, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loader_is_as_long_as_an_epoch() -> None:
    loader = RowLoader(stream(600, 2, 15))
    assert len(list(loader)) == len(list(loader)) == len(loader)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 300), length=st.integers(1, 100))
def test_a_text_is_read_once_and_to_its_end(total: int, length: int) -> None:
    loader = TextLoader(np.arange(total), length)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.cat([b.inputs for b in batches], dim=1).tolist() == [list(range(total - 1))]
    assert torch.cat([b.targets for b in batches], dim=1).tolist() == [list(range(1, total))]
    assert [bool(b.fresh) for b in batches] == [True] + [False] * (len(batches) - 1)


@pytest.mark.parametrize(("total", "rows", "length"), [(10, 1, 10), (10, 8, 2), (0, 1, 1)])
def test_too_short_a_text_is_refused(total: int, rows: int, length: int) -> None:
    with pytest.raises(UserError, match="too few"):
        stream(total, rows, length)
    with pytest.raises(UserError, match="at least 2"):
        TextLoader(np.zeros(1), 4)
