import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from mmrec.checkpoints.cached import HISTORY, NO_TOKEN, ORDERS
from mmrec.inference.ngram_cache import LARGEST_COUNT, PROBES, NgramCache, extended_history
from mmrec.model.ops import dispatch

N = 12
HAS_KERNELS = dispatch.choose_native()
NOTHING = np.full(HISTORY, NO_TOKEN)


@pytest.fixture(
    params=[False, *([True] if HAS_KERNELS else [])], ids=lambda wanted: "compiled" if wanted else "plain"
)
def form(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Count by compiled code, or by the plain form; return which."""
    if request.param:
        yield True
        return
    with dispatch.without_native():
        yield False


both_forms = pytest.mark.usefixtures("form")


def _text(length: int, seed: int = 0, size: int = N) -> np.ndarray:
    """Return tokens that come back: some of them random, some a repetition of what was there before."""
    random = np.random.default_rng(seed)
    text = list(random.integers(0, size, size=30))
    while len(text) < length:
        begin, length_of = random.integers(0, len(text)), random.integers(1, 40)
        text += [*text[begin : begin + length_of], int(random.integers(0, size))]
    return np.array(text[:length], dtype=np.int64)


def _counted(before: np.ndarray, expected: int) -> np.ndarray:
    """Count, in the plain way, what followed the contexts before position ``expected``: [K, N]."""
    text = np.concatenate([NOTHING, before]).tolist()
    position = HISTORY + expected
    counts = np.zeros((len(ORDERS), N), dtype=np.float32)
    for number, order in enumerate(ORDERS):
        context = text[position - order : position]
        for other in range(HISTORY, position):
            if text[other - order : other] == context:
                counts[number, text[other]] += 1
    return counts


@both_forms
def test_counts_are_those_of_the_text_before_each_token_however_it_is_cut() -> None:
    text = _text(400)
    for sizes in ([400], [1] * 150, [7, 128, 1, 64]):
        cache, history, done = NgramCache(np.zeros(1 << 17, dtype=np.uint16), N), NOTHING, 0
        for size in sizes:
            part = text[done : done + size]
            counts = cache.counts(history, part)
            assert counts.shape == (len(ORDERS), len(part) + 1, N)
            for offset in range(0, len(part) + 1, 5):
                np.testing.assert_array_equal(counts[:, offset], _counted(text, done + offset))
            history = cache.update(history, part)
            done += size
        np.testing.assert_array_equal(history, extended_history(NOTHING, text[:done]))


@both_forms
def test_followers_are_known_where_shorter_contexts_have_made_room_for_others() -> None:
    text = _text(400)
    cache, history = NgramCache(np.zeros(1 << 17, dtype=np.uint16), N), NOTHING
    for begin in range(0, 400, 100):
        history = cache.update(history, text[begin : begin + 100])
    before = extended_history(NOTHING, text[:300])
    found = [cache.followers(before, number) for number in range(len(ORDERS))]
    np.testing.assert_array_equal(found, cache.counts(before, text[:0])[:, 0] > 0)
    assert all(each[text[300]] for each in found)
    starts, _ = cache._places(cache._hashes(before, text[:0]))
    cache.table[int(starts[0, 0]) : int(starts[0, 0]) + N + PROBES] = 0  # of the shortest context
    assert not cache.counts(before, text[:0])[:, 0, text[300]].any()
    for number in range(1, len(ORDERS)):
        assert cache.followers(before, number)[text[300]]


@both_forms
def test_a_full_table_stays_as_large_as_it_is_and_keeps_what_is_frequent() -> None:
    cache, history = NgramCache(np.zeros(2048, dtype=np.uint16), N), NOTHING
    random = np.random.default_rng(0)
    for _ in range(40):
        history = cache.update(history, random.integers(0, N, size=128))
        history = cache.update(history, np.array([1, 2, 3] * 8))
    row = cache.counts(np.concatenate([NOTHING[:-2], [1, 2]]), NOTHING[:0])[0, 0]
    assert cache.table.size == 2048
    assert row.argmax() == 3
    assert row[3] > 10


@both_forms
def test_counts_are_halved_together_and_none_is_lost() -> None:
    cache, history = NgramCache(np.zeros(1 << 16, dtype=np.uint16), N), NOTHING
    for _ in range(40):
        history = cache.update(history, np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4]))
    row = cache.counts(np.concatenate([NOTHING[:-2], [1, 2]]), NOTHING[:0])[0, 0]
    assert row.max() <= LARGEST_COUNT
    assert row[3] / row[4] == pytest.approx(3, rel=0.25)
    assert set(np.flatnonzero(row)) == {3, 4}


@both_forms
def test_the_same_text_gives_the_same_table() -> None:
    tables = []
    for _ in range(2):
        cache, history = NgramCache(np.zeros(4096, dtype=np.uint16), N), NOTHING
        for part in np.split(_text(1280, seed=1), 10):
            history = cache.update(history, part)
        tables.append(cache.table)
    np.testing.assert_array_equal(tables[0], tables[1])
    assert PROBES > 1


@both_forms
def test_tables_of_earlier_versions_are_read() -> None:
    """What a table says of a text is where every version looks for it."""
    cache = NgramCache(np.zeros(1 << 12, dtype=np.uint16), N)
    cache.update(NOTHING, np.arange(30) % N)
    assert zlib.crc32(cache.table.astype("<u2").tobytes()) == 3329112166


@pytest.mark.skipif(not HAS_KERNELS, reason="no C compiler")
@pytest.mark.parametrize(
    ("vocab_size", "slots", "length"),
    [(N, 512, 4000), (N, 1 << 14, 4000), (256, 1 << 12, 1500), (1024, 1 << 15, 600), (4096, 1 << 16, 600)],
)
def test_compiled_code_counts_to_the_bit_as_the_plain_form(vocab_size: int, slots: int, length: int) -> None:
    """Also where a table is full, where many tokens want one slot, and where counts are halved."""
    random = np.random.default_rng(3)
    caches = [NgramCache(np.zeros(slots, dtype=np.uint16), vocab_size) for _ in range(2)]
    assert caches[0].compiled is not None
    history, text = NOTHING, _text(length, seed=2, size=vocab_size)
    text[300:500] = np.resize(text[:3], 200)
    done = 0
    while done < len(text):
        part = text[done : done + int(random.integers(1, 200))]
        with dispatch.without_native():
            counts = caches[1].counts(history, part)
            after = caches[1].update(history, part)
        np.testing.assert_array_equal(caches[0].counts(history, part), counts)
        np.testing.assert_array_equal(caches[0].update(history, part), after)
        np.testing.assert_array_equal(caches[0].table, caches[1].table)
        history, done = after, done + len(part)
    assert (caches[0].table > 0).mean() > (0.9 if slots == 512 else 0.01)
