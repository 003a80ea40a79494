"""A cache of n-grams: counted after they were scored, kept in a memory, and bounded where text is generated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_text
from serving import Client
from torch import Tensor

from mmrec.checkpoints.cached import NO_TOKEN, ORDERS
from mmrec.checkpoints.learned import PART
from mmrec.checkpoints.state_file import SavedState, _tensors, load_memory, save_memory
from mmrec.core.errors import UserError
from mmrec.inference.cached_reading import NEVER, CachedGenerating, HeldBack, with_counted
from mmrec.inference.generate import generate_tokens
from mmrec.inference.ngram_cache import SHORT_SHARE
from mmrec.inference.reading import WEIGHED, LearnOptions, Reader, with_text_counted
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig, RecurrentLM

N = 11
LEARNS = [False, True]


@pytest.fixture(scope="module")
def net() -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM(ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24), N).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Return tokens [T] that say the same twice, with something else between."""
    random = torch.Generator().manual_seed(1)
    said = torch.randint(0, N, (3 * PART + 20,), generator=random)
    return torch.cat([said, torch.randint(0, N, (50,), generator=random), said])


def _counting(net: RecurrentLM, learn: bool = False) -> SavedState:
    return LearnOptions(learn).applied(net, SavedState.empty(net)).caching(1)


def _read(net: RecurrentLM, tokens: Tensor, memory: SavedState) -> tuple[Tensor, SavedState]:
    reader = Reader(net, memory)
    return torch.cat([part.logits for part in reader.read(tokens)]), reader.memory


def _assert_same(one: SavedState, other: SavedState) -> None:
    mine, theirs = _tensors(one), _tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert one.position == other.position


@pytest.mark.parametrize("learn", LEARNS)
def test_what_comes_back_is_expected_and_nothing_is_known_before_it_is_read(
    net: RecurrentLM, text: Tensor, learn: bool
) -> None:
    logits, memory = _read(net, text, _counting(net, learn))
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(len(text)))
    nll = -logits[torch.arange(len(text)), text]
    again = len(text) - 2 * PART
    assert nll[1:PART].mean() > 2.2
    assert nll[again:].mean() < 0.5
    assert memory.position == len(text)

    changed = text.clone()
    changed[again + 5 :] = (changed[again + 5 :] + 1) % N
    other, _ = _read(net, changed, _counting(net, learn))
    torch.testing.assert_close(other[: again + 6], logits[: again + 6], atol=1e-5, rtol=0)


@pytest.mark.parametrize("learn", LEARNS)
def test_two_readings_through_files_are_one_to_the_bit(
    net: RecurrentLM, text: Tensor, learn: bool, tmp_path: Path
) -> None:
    _, at_once = _read(net, text, _counting(net, learn))
    memory, done = _counting(net, learn), 0
    for size in (1, PART + 10, 2 * PART, len(text)):
        _, memory = _read(net, text[done : done + size], memory)
        done += size
        save_memory(tmp_path / "a.mem", memory, "model")
        memory = load_memory(tmp_path / "a.mem", net, "model")
    _assert_same(memory, at_once)


@pytest.mark.parametrize("first", ["learn", "cache"])
def test_one_can_be_begun_in_the_middle_of_a_part_of_the_other(net: RecurrentLM, text: Tensor, first: str) -> None:
    begun = SavedState.empty(net)
    begun = begun.learning(net) if first == "learn" else begun.caching(1)
    results = []
    for sizes in ([len(text)], [30, len(text)]):
        _, memory = _read(net, text[: PART + 40], begun)
        both = memory.learning(net).caching(1)
        done = PART + 40
        for size in sizes:
            _, both = _read(net, text[done : done + size], both)
            done += size
        results.append(both)
    _assert_same(*results)
    assert results[0].learned is not None
    assert results[0].cached is not None
    assert torch.equal(results[0].learned.tokens, results[0].cached.tokens)


def test_reading_on_leaves_the_memory_before_it_as_it_was(net: RecurrentLM, text: Tensor) -> None:
    _, memory = _read(net, text, _counting(net))
    before = {name: tensor.clone() for name, tensor in _tensors(memory).items()}
    _read(net, text, memory)
    list(generate_tokens(net, text[:5], SamplingOptions(20, verbatim=8), memory))
    assert all(torch.equal(before[name], tensor) for name, tensor in _tensors(memory).items())


@pytest.mark.parametrize("learn", LEARNS)
@pytest.mark.parametrize("verbatim", [4, 10])
def test_no_run_of_what_was_read_gets_longer_than_it_may(
    net: RecurrentLM, text: Tensor, learn: bool, verbatim: int
) -> None:
    _, memory = _read(net, text, _counting(net, learn))
    before = text[-ORDERS[-1] :].tolist()
    options = SamplingOptions(150, temperature=0.2, verbatim=verbatim)
    generated = list(generate_tokens(net, text[:0], options, memory))
    said, written = text.tolist(), [*before, *generated]
    order = max(order for order in ORDERS if order <= verbatim)
    known = {tuple(said[at : at + order + 1]) for at in range(len(said) - order)}
    runs = [tuple(written[at : at + order + 1]) for at in range(len(before) - order, len(written) - order)]
    assert not [run for run in runs if run in known]
    if verbatim == 10:  # and it does take part
        known = {tuple(said[at : at + 5]) for at in range(len(said) - 4)}
        assert sum(tuple(generated[at : at + 5]) in known for at in range(140)) > 10


def test_the_bound_holds_where_what_follows_short_contexts_has_made_room(net: RecurrentLM, text: Tensor) -> None:
    _, memory = _read(net, text, _counting(net))
    assert memory.cached is not None
    table = memory.cached.table.clone()
    table[: len(table) // SHORT_SHARE] = 0
    generating = CachedGenerating(replace(memory.cached, table=table), N, verbatim=8)
    for token in text[:20].tolist():
        generating.push(token)
    found = generating.mixed(torch.zeros(1, N).log_softmax(-1))
    assert (found == NEVER).nonzero().flatten().tolist() == [int(text[20])]


def test_without_its_option_generating_leaves_the_cache_out(net: RecurrentLM, text: Tensor) -> None:
    _, plain = _read(net, text, SavedState.empty(net))
    _, counted = _read(net, text, _counting(net))
    options = SamplingOptions(60)
    tokens = [list(generate_tokens(net, text[:0], options, memory)) for memory in (plain, counted)]
    assert tokens[0] == tokens[1]


def test_what_cannot_be_is_refused(net: RecurrentLM, text: Tensor, tmp_path: Path) -> None:
    for size in (0, -1, 4097):
        with pytest.raises(UserError, match="must be 1 to"):
            SavedState.empty(net).caching(size)
    with pytest.raises(UserError, match="has a cache of 1 MiB, not 2"):
        _counting(net).caching(2)
    many = RecurrentLM(net.config, 4097)
    with pytest.raises(UserError, match="at most 4,096 tokens; this one has 4,097"):
        SavedState.empty(many).caching(1)
    with pytest.raises(UserError, match="verbatim is for a memory with a cache"):
        list(generate_tokens(net, text[:3], SamplingOptions(5, verbatim=8)))
    with pytest.raises(UserError, match="verbatim is 1; it must be 0, or at least 2"):
        SamplingOptions(verbatim=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("history", torch.full((ORDERS[-1],), N), "tokens that the model does not have"),
        ("history", torch.full((3,), 1), "does not hold what a memory"),
        ("tokens", torch.full((PART,), 1), "more tokens than a part has"),
        ("weights", torch.full((len(ORDERS) + 1, len(ORDERS) + 2), 1e6, dtype=torch.float64), "weights that reading"),
        ("curvature", torch.zeros(1, dtype=torch.float64), "does not hold what a memory"),
    ],
)
def test_a_file_with_what_reading_never_makes_is_refused(
    net: RecurrentLM, field: str, value: Tensor, message: str, tmp_path: Path
) -> None:
    memory = _counting(net)
    assert memory.cached is not None
    changed = replace(memory.cached, **{field: value})  # type: ignore[arg-type]
    save_memory(tmp_path / "a.mem", replace(memory, cached=changed), "model")
    with pytest.raises(UserError, match=message):
        load_memory(tmp_path / "a.mem", net, "model")


def test_the_server_keeps_memories_with_a_cache_and_generates_within_its_bound(client: Client) -> None:
    said = make_text()[:6000]
    about = client.good("POST", "/v1/memories", {"name": "book", "text": said, "cache": 1})
    assert about["position"] == len(said)
    request = {"memory": "book", "text": said[:600]}
    plain = client.good("POST", "/v1/score", {"text": said[:600]})
    assert client.good("POST", "/v1/score", request)["nats_per_token"] < plain["nats_per_token"]
    asked = {"prompt": said[:100], "memory": "book", "max_tokens": 60, "temperature": 0, "logprobs": 3}
    written = client.good("POST", "/v1/completions", asked | {"verbatim": 8})["choices"][0]["text"]
    whole = said[:100] + written
    assert not [at for at in range(92, len(whole) - 8) if whole[at : at + 9] in said]
    for wrong in ({"verbatim": 1}, {"verbatim": 8, "memory": None}):
        status, error = client.ask("POST", "/v1/completions", asked | wrong)
        assert (status, error["error"]["param"]) == (400, "verbatim")
    for size in (2, 65):
        fields = {"name": "x", "text": "to", "memory": "book", "cache": size}
        status, error = client.ask("POST", "/v1/memories", fields)
        assert (status, error["error"]["param"]) == (400, "cache")
    data = client.good("GET", "/v1/memories/book/file")
    assert len(data) > 1 << 20


def test_a_table_is_copied_where_it_is_to_change_and_not_before(net: RecurrentLM, text: Tensor) -> None:
    _, memory = _read(net, text[:PART], _counting(net))
    assert memory.cached is not None
    table, before = memory.cached.table, memory.cached.table.clone()
    reader = Reader(net, memory)
    for count, is_shared in ((PART - 1, True), (1, False)):
        assert len([*reader.read(text[:count])]) == 1
        assert reader.memory.cached is not None
        assert (reader.memory.cached.table.data_ptr() == table.data_ptr()) == is_shared
        assert torch.equal(reader.memory.cached.table, before) == is_shared
    list(generate_tokens(net, text[:9], SamplingOptions(5, verbatim=8), memory))
    assert torch.equal(table, before)


@pytest.mark.parametrize("learn", LEARNS)
def test_ngrams_of_a_text_that_was_counted_are_weighed_by_its_end(net: RecurrentLM, learn: bool) -> None:
    """Of tokens that are drawn at random, n-grams say nothing, and what they say is not believed."""
    random = np.random.default_rng(0)
    text = random.integers(0, N, 40 * PART)
    begun = LearnOptions(learn).applied(net, SavedState.empty(net))
    weighed = with_text_counted(net, begun, 1, np.array_split(text, 7))
    assert weighed.cached is not None
    assert weighed.position == 0
    assert (weighed.cached.history == NO_TOKEN).all()
    fresh = begun.caching(1)
    assert fresh.cached is not None
    counted = with_counted(fresh.cached, [text], N)
    assert (counted.table != 0).sum() == pytest.approx(int((weighed.cached.table != 0).sum()), rel=1e-2)
    counted = replace(counted, history=weighed.cached.history)
    more = random.integers(0, N, 2 * PART)
    plain, before, after = (  # ln 11 is 2.398
        float(torch.cat([part.nll for part in Reader(net, memory).read(more)]).mean())
        for memory in (begun, replace(fresh, cached=counted), weighed)
    )
    assert after < before - 0.05
    assert after < plain + 0.02


def test_what_is_counted_and_what_is_held_back_are_the_whole_text() -> None:
    for length in (0, 1, PART - 1, PART, 3 * PART + 5, WEIGHED * PART, WEIGHED * PART + 1, 20 * PART + 7):
        text = np.arange(length)
        for pieces in (1, 3, 50):
            last = HeldBack(np.array_split(text, pieces), WEIGHED)
            counted = np.concatenate([*last])
            assert (np.concatenate([counted, last.held]) == text).all()
            assert len(last.held) == min(length // PART, WEIGHED) * PART
