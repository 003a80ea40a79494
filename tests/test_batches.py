"""The order of training: every token once an epoch, rows that continue, any place reached by its number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.core.errors import UserError
from mmrec.data.batches import (
    IGNORE_INDEX,
    STRETCH,
    Batch,
    SegmentSampler,
    StatefulEvalLoader,
    TrainLoader,
    WindowedEvalLoader,
)


def stream(total: int, rows: int, length: int, **options: int | float) -> SegmentSampler:
    return SegmentSampler(np.arange(total, dtype=np.uint32), rows, length, **options)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(30, 400),
    rows=st.integers(1, 4),
    world=st.integers(1, 3),
    length=st.integers(1, 29),
    segment=st.integers(1, 500),
    interleave=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
def test_every_token_is_predicted_once_an_epoch(
    total: int, rows: int, world: int, length: int, segment: int, interleave: int, epoch: int
) -> None:
    predicted: list[int] = []
    for rank in range(world):
        options = {"segment_len": segment, "interleave": interleave}
        one = stream(total, rows, length, rank=rank, world_size=world, **options)
        for number in range(epoch * len(one), (epoch + 1) * len(one)):
            batch = one.batch(number)
            assert 1 <= batch.inputs.shape[1] <= length
            scored = batch.targets != IGNORE_INDEX
            # What is predicted is the token after the one that is read.
            assert ((batch.inputs[scored] + 1) % total == batch.targets[scored]).all()
            predicted += batch.targets[scored].tolist()
    assert sorted(predicted) == list(range(total))


def test_rows_continue_from_batch_to_batch_until_the_segment_ends() -> None:
    one = stream(1000, 2, 10, segment_len=50, reset_probability=1.0)
    assert one.segments == 20
    for number in range(len(one) - 1):
        goes_on = one.batch(number).targets[:, -1] == one.batch(number + 1).inputs[:, 0]
        assert goes_on.all() or number % 5 == 4  # only at its end may a row go elsewhere
        assert one.batch(number).reset_mask.tolist() == [number % 5 == 0] * 2


def test_interleaved_streams_take_turns_and_each_continues() -> None:
    one = stream(1000, 2, 10, segment_len=50, interleave=4)  # ten segments a row: four streams, four more, and two
    batches = [one.batch(number) for number in range(len(one))]
    assert [batch.stream for batch in batches] == [0, 1, 2, 3] * 10 + [0, 1] * 5
    for index in range(4):
        own = [batch for batch in batches if batch.stream == index]
        for number, (batch, later) in enumerate(itertools.pairwise(own)):
            goes_on = batch.targets[:, -1] == later.inputs[:, 0]
            assert goes_on.all() or number % 5 == 4
    # The same batches as without interleaving, in another order.
    plain = stream(1000, 2, 10, segment_len=50)
    alone = [plain.batch(number).inputs.tolist() for number in range(len(plain))]
    assert sorted(batch.inputs.tolist() for batch in batches) == sorted(alone)


def test_segments_are_read_in_another_order_each_epoch() -> None:
    one = stream(1000, 2, 10, segment_len=50)
    orders = [one._order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(20))


def test_batches_of_an_epoch_are_of_nearly_equal_length() -> None:
    one = stream(1003, 4, 50)
    assert {one.batch(n).inputs.shape[1] for n in range(len(one))} == {41, 42}


def test_each_epoch_cuts_the_text_elsewhere() -> None:
    one = stream(1000, 2, 50)
    firsts = {int(one.batch(epoch * len(one)).inputs[0, 0]) for epoch in range(5)}
    assert len(firsts) == 5


def test_resets_are_as_frequent_as_asked() -> None:
    one = stream(80_000, 4, 10, segment_len=10, reset_probability=0.3)
    share = torch.stack([one.batch(n).reset_mask for n in range(len(one))]).float().mean()
    assert 0.28 < share < 0.32
    never = stream(4000, 4, 10, reset_probability=0.0)
    assert not any(never.batch(n).reset_mask.any() for n in range(len(never)))


def test_the_seed_decides() -> None:
    assert torch.equal(stream(500, 2, 20, seed=1).batch(7).inputs, stream(500, 2, 20, seed=1).batch(7).inputs)
    assert not torch.equal(stream(500, 2, 20, seed=1).batch(7).inputs, stream(500, 2, 20, seed=2).batch(7).inputs)


@settings(max_examples=50, deadline=None)
@given(stop=st.integers(0, 60))
def test_a_loader_goes_on_where_its_state_says(stop: int) -> None:
    one = stream(600, 2, 15)
    whole = TrainLoader(one)
    expected = [batch for _ in range(3) for batch in whole]
    first = TrainLoader(one)
    seen: list[Batch] = []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
    second = TrainLoader(one)
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen.extend(itertools.islice(second, len(expected) - len(seen)))
    for a, b in zip(seen, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert a.stream == b.stream


@pytest.mark.parametrize("stop", [7, 20])
def test_the_same_rows_on_another_number_of_processes(stop: int) -> None:
    """The rule of resuming: what 2 processes of 2 rows read is what 1 process of 4 rows reads, from any place."""
    one = TrainLoader(stream(600, 4, 15))
    pair = [TrainLoader(stream(600, 2, 15, rank=rank, world_size=2)) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(one.state_dict() | {"position": stop})
    one.load_state_dict(pair[0].state_dict())
    for whole, first, second in zip(one, *pair, strict=True):
        for a, b, c in zip(whole[:3], first[:3], second[:3], strict=True):
            assert torch.equal(a, torch.cat([b, c]))


def test_another_cut_is_refused_within_an_epoch_and_taken_up_at_its_end() -> None:
    before = TrainLoader(stream(600, 4, 15))
    state = before.state_dict()
    after = TrainLoader(stream(600, 3, 15))
    with pytest.raises(UserError, match="rows 4 there, 3 here"):
        after.load_state_dict(state | {"position": 2 * len(before) + 1})
    after.load_state_dict(state | {"position": 2 * len(before)})
    assert after.position == 2 * len(after)


def test_a_loader_is_as_long_as_an_epoch() -> None:
    loader = TrainLoader(stream(600, 2, 15))
    assert len(list(loader)) == len(list(loader)) == len(loader)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 300), length=st.integers(1, 100))
def test_a_text_is_read_once_and_to_its_end(total: int, length: int) -> None:
    loader = StatefulEvalLoader(np.arange(total), length)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.cat([b.inputs for b in batches], dim=1).tolist() == [list(range(total - 1))]
    assert torch.cat([b.targets for b in batches], dim=1).tolist() == [list(range(1, total))]
    assert [bool(b.reset_mask) for b in batches] == [True] + [False] * (len(batches) - 1)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 60_000), length=st.integers(100, 5000), share=st.floats(0, 1))
def test_a_text_that_is_scored_in_part_is_scored_all_over(total: int, length: int, share: float) -> None:
    whole = len(StatefulEvalLoader(np.arange(total), length))
    loader = StatefulEvalLoader(np.arange(total), length, int(share * (whole - 1)))
    batches = list(loader)
    assert len(loader) == whole
    assert len(batches) == int(share * (whole - 1))
    scored = [token for batch in batches for token in batch.targets[0].tolist()]
    assert scored == sorted(set(scored))  # none twice
    assert [batch.targets.numel() for batch in batches] == [loader.targets(n) for n in range(len(batches))]
    assert all(batch.targets.numel() == length for batch in batches)
    begins = [number for number, batch in enumerate(batches) if batch.reset_mask]
    for before, after in itertools.pairwise(range(len(batches))):
        follows = batches[before].targets[0, -1] == batches[after].inputs[0, 0]
        assert follows or after in begins
    if len(begins) > 1:
        assert scored[-1] == total - 1
        assert min(after - before for before, after in itertools.pairwise(begins)) * length >= STRETCH
        # Between two stretches a like number of tokens is left out, however many that are.
        ends = [batches[number - 1].targets[0, -1].item() for number in begins[1:]]
        gaps = [batches[number].inputs[0, 0].item() - end for number, end in zip(begins[1:], ends, strict=True)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("total", "rows", "length"), [(10, 1, 10), (10, 8, 2), (0, 1, 1)])
def test_too_short_a_text_is_refused(total: int, rows: int, length: int) -> None:
    with pytest.raises(UserError, match="too few"):
        stream(total, rows, length)
    with pytest.raises(UserError, match="at least 2"):
        StatefulEvalLoader(np.zeros(1), 4)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 300), window=st.integers(1, 100), rows=st.integers(1, 5))
def test_windows_score_every_token_once_from_an_empty_memory(total: int, window: int, rows: int) -> None:
    loader = WindowedEvalLoader(np.arange(total), window, rows)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.cat([b.targets.flatten() for b in batches]).tolist() == list(range(1, total))
    for batch in batches:
        assert (batch.inputs + 1 == batch.targets).all()
        assert batch.reset_mask.all()
        assert (batch.inputs[:, 0] % window == 0).all()
