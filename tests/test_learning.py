"""What is read is learned after it was predicted, kept in a memory, and gone on from; the model stays as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_text
from torch.nn import functional as F

from mmrec.checkpoints.learned import LARGEST_DIFFERENCE, PART, Form
from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState, _tensors, load_memory, save_memory
from mmrec.core.errors import UserError
from mmrec.inference import learning
from mmrec.inference.reading import Reader
from mmrec.model import ModelConfig, RecurrentLM, State, detach_state
from mmrec.model.ops.native.products import has_tiles
from mmrec.model.without_autograd import fixed_length

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)
FORMS: tuple[Form, ...] = ("full", "small")


def made(symbols: int = 7, config: ModelConfig = SHAPE) -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM(config, symbols).eval()


def read(net: RecurrentLM, tokens: torch.Tensor, memory: SavedState) -> tuple[torch.Tensor, SavedState]:
    """Return the NLL of each token and the memory after them."""
    reader = Reader(net, memory)
    return torch.cat([part.nll for part in reader.read(tokens)]), reader.memory


def learning_memory(net: RecurrentLM, form: Form = "full") -> SavedState:
    return SavedState.empty(net).learning(net, form)


def assert_same(one: SavedState, other: SavedState) -> None:
    """To the bit."""
    mine, theirs = _tensors(one), _tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert (one.position, one.pending) == (other.position, other.pending)


def plain(net: RecurrentLM, tokens: torch.Tensor, form: Form) -> torch.Tensor:
    """Return the NLL of each token but the first by the rule as docs/memory.md has it, number by number."""
    learner = made(len(net.head.weight), net.config)
    learns = {
        name: weight
        for name, weight in learner.named_parameters()
        if form == "full" or weight.dim() == 1 or "conv" in name or name == "embedding.weight"
    }
    trained = {name: weight.detach().clone() for name, weight in learns.items()}
    squares: dict[str, torch.Tensor] = {name: torch.zeros_like(weight) for name, weight in learns.items()}
    states: list[State] = [net.zero_state(1), net.zero_state(1)]
    mix, curvature = torch.tensor([0.4, 0.6], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    last, found = torch.zeros(2, 1, len(net.head.weight)), []
    for updates, part in enumerate(tokens.split(PART), start=1):
        logits = []
        for number, model in enumerate((net, learner)):
            each, states[number] = model(part[None], states[number])
            logits.append(torch.cat([last[number], each[0]]))
            states[number] = detach_state(states[number])
        both = torch.stack(logits)
        last = both[:, -1:].detach()
        scores, targets = both[:, :-1].detach().log_softmax(-1), part
        learned = F.cross_entropy(both[1, :-1], targets)
        for begin in range(0, len(targets) + 1, 16):
            here, block = scores[:, begin : begin + 16], targets[begin : begin + 16]
            p = (mix[0] * here[0] + mix[1] * here[1]).softmax(-1)
            found.append(-p[torch.arange(len(block)), block].log())
            if len(block) == 16:
                slope, bend = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
                for t, target in enumerate(block):
                    slope += here[:, t, target] - (p[t] * here[:, t]).sum(-1)
                    bend += torch.cov(here[:, t].double(), correction=0, aweights=p[t].double())
                curvature = 0.9 * curvature + bend
                mix = (mix + torch.linalg.inv(curvature + 16 * torch.eye(2)) @ slope).clamp(-0.5, 1.5)
        if len(part) < PART:
            break
        for (name, weight), gradient in zip(
            learns.items(), torch.autograd.grad(learned, list(learns.values())), strict=True
        ):
            with torch.no_grad():
                squares[name] = 0.9925 * squares[name] + 0.0075 * (gradient.square() + 1e-30)
                scale = squares[name] / (1 - 0.9925**updates)
                if weight.dim() == 2:
                    rows, columns = scale.mean(1), scale.mean(0)
                    scale = torch.outer(rows, columns) / scale.mean()
                rate = {"full": 4.5e-4, "small": 4e-3}[form]
                update = gradient / (scale.sqrt() + 1e-8)
                root = float(update.square().mean().sqrt()) if form == "full" else 0.0
                update = (update / max(1.0, root / 3)).clamp(-10, 10)
                difference = (weight - trained[name] - rate * update) * (1 - 3e-4)
                weight.copy_(trained[name] + difference.half().float())
    return torch.cat(found)[1:].float()


@pytest.fixture(params=[False, True], ids=["float32", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are of tiles of bfloat16, as on a processor that multiplies them, or of float32."""
    wanted: bool = request.param
    if wanted and not has_tiles():
        pytest.skip("no compiled kernels, or no products of bfloat16 by this processor")
    monkeypatch.setattr(fixed_length, "has_tiles", lambda: wanted)
    return wanted


@pytest.mark.parametrize("form", FORMS)
def test_the_reader_is_the_rule_written_plainly(form: Form, tiles: bool) -> None:
    net, tokens = made(), torch.randint(7, (3 * PART + 50,))
    tokens[PART : 3 * PART] = tokens[:PART].repeat(2)
    found, _ = read(net, tokens, learning_memory(net, form))
    expected = plain(net, tokens, form)
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=0.01 if tiles else 1e-5)
    untouched, _ = read(net, tokens, SavedState.empty(net))
    assert not torch.allclose(found[2 * PART :], untouched[2 * PART :], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_parts_is_the_text_at_once_to_the_bit(form: Form, tiles: bool, tmp_path: Path) -> None:
    """Wherever it is cut, and through files between. What a part that is not whole is scored with is float32."""
    net, tokens, path = made(), torch.randint(7, (3 * PART + 7,)), tmp_path / "a.mem"
    at_once, whole = read(net, tokens, learning_memory(net, form))
    memory, found = learning_memory(net, form), []
    for begin, end in pairwise((0, 1, PART - 1, PART, PART + 60, 3 * PART + 2, len(tokens))):
        nll, memory = read(net, tokens[begin:end], memory)
        found.append(nll)
        save_memory(path, memory, "hash")
        assert_same(load_memory(path, net, "hash"), memory)
        memory = load_memory(path, net, "hash")
    assert_same(memory, whole)
    torch.testing.assert_close(torch.cat(found), at_once, rtol=1e-5, atol=0.01 if tiles else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("begun_by_tiles", [True, False])
def test_a_memory_goes_to_a_machine_without_bfloat16_and_back(
    form: Form, begun_by_tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_tiles():
        pytest.skip("no compiled kernels, or no products of bfloat16 by this processor")
    net, tokens, path = made(), torch.randint(7, (6 * PART + 9,)), tmp_path / "a.mem"
    tokens[PART : 5 * PART] = tokens[:PART].repeat(4)
    found = []
    for begin, end, by_tiles in ((0, 200, begun_by_tiles), (200, len(tokens), not begun_by_tiles)):
        monkeypatch.setattr(fixed_length, "has_tiles", lambda by_tiles=by_tiles: by_tiles)
        memory = load_memory(path, net, "hash") if begin else learning_memory(net, form)
        nll, memory = read(net, tokens[begin:end], memory)
        found.append(nll)
        save_memory(path, memory, "hash")
    expected, plain = read(net, tokens, learning_memory(net, form))
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=0.02)
    assert memory.learned is not None
    assert plain.learned is not None
    for name, difference in memory.learned.difference.items():
        exact = plain.learned.difference[name].float()
        assert (difference.float() - exact).norm() < 0.05 * exact.norm(), name


def test_inference_mode_around_it_changes_nothing() -> None:
    net, tokens = made(), torch.randint(7, (3 * PART + 9,))
    expected, memory = read(net, tokens, learning_memory(net))
    with torch.inference_mode():
        found, inside = read(net, tokens.clone(), learning_memory(net))
        Reader(net, inside).generating(1)[1].step([1])
    assert torch.equal(found, expected)
    assert_same(inside, memory)


def test_what_comes_later_changes_no_score_and_the_model_stays_as_it_was() -> None:
    net, tokens = made(), torch.randint(7, (4 * PART,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = tokens.clone()
    other[2 * PART :] = torch.randint(7, (2 * PART,))
    (one, _), (two, _) = (read(net, text, learning_memory(net)) for text in (tokens, other))
    assert torch.equal(one[: 2 * PART], two[: 2 * PART])
    assert not torch.allclose(one[2 * PART :], two[2 * PART :])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_text_that_repeats_itself_is_learned() -> None:
    net, tokens = made(), torch.tensor([0, 3, 1, 5, 2] * 400)
    untouched, _ = read(net, tokens, SavedState.empty(net))
    for form in FORMS:
        found, _ = read(net, tokens, learning_memory(net, form))
        assert found[-200:].mean() < 0.7 * untouched[-200:].mean()


def test_learning_may_begin_after_something_was_read(tiles: bool) -> None:
    net, tokens = made(), torch.randint(7, (3 * PART,))
    _, before = read(net, tokens[: PART + 60], SavedState.empty(net))
    nll, after = read(net, tokens[PART + 60 :], before.learning(net))
    untouched, _ = read(net, tokens[PART + 60 :], before)
    near = 0.01 if tiles else 1e-5
    torch.testing.assert_close(nll[:16], untouched[:16], rtol=1e-5, atol=near)  # before the mixture moves
    assert after.learned is not None
    assert after.learned.updates == 1
    with pytest.raises(UserError, match="learns in the form full, not small"):
        after.learning(net, "small")


@pytest.fixture(scope="module")
def fluent() -> LoadedModel:
    """A model that knows the text of ``make_text``, by bytes."""
    from mmrec.tokenizers import ByteTokenizer

    net, tokens = made(256, replace(SHAPE, dim=32)), torch.from_numpy(text_tokens(make_text()))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    rows = tokens[:8000].view(8, -1)
    for step in range(60):
        part = rows[:, (step % 10) * 99 : (step % 10) * 99 + 100]
        logits, _ = net(part[:, :-1], net.zero_state(8))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).backward()
        optimizer.step()
    return LoadedModel(net.requires_grad_(False), ByteTokenizer(), 60)


def text_tokens(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


@pytest.mark.parametrize("spoiling", ["another text", "random bytes", "one letter"])
def test_what_was_learned_costs_little_elsewhere(fluent: LoadedModel, spoiling: str) -> None:
    """After something foreign, text of the training's kind is at most 0.05 nats/token above the untouched model."""
    net, own = fluent.net, torch.from_numpy(text_tokens(make_text())[8000:])
    random = np.random.default_rng(0)
    foreign = {
        "another text": text_tokens("A sentence, quite unlike those that came before it!\n" * 120),
        "random bytes": random.integers(0, 256, 6000),
        "one letter": np.full(6000, 97),
    }[spoiling]
    untouched, _ = read(net, own, SavedState.empty(net))
    _, memory = read(net, torch.from_numpy(foreign), learning_memory(net))
    assert memory.learned is not None
    for x in memory.learned.difference.values():
        assert x.isfinite().all()
    found, after = read(net, own, memory)
    assert found.mean() < untouched.mean() + 0.05
    assert all(bool(tensor.isfinite().all()) for tensor in _tensors(after).values())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = made()
    _, memory = read(net, torch.randint(7, (PART,)), learning_memory(net))
    learned = memory.learned
    assert learned is not None
    gradients = {name: torch.full(x.shape, torch.nan) for name, x in learned.difference.items()}
    difference, squares = learning.updated_weights(learned, gradients)
    assert difference is learned.difference
    assert squares is learned.squares


@pytest.mark.parametrize("form", FORMS)
def test_a_part_unlike_those_before_goes_no_further_than_three_of_them(form: Form) -> None:
    """In the full form; in the small one each number is bounded alone."""
    learned = learning_memory(made(), form).learned
    assert learned is not None
    squares = {name: torch.ones_like(x) for name, x in learned.squares.items()}
    settled, rate = replace(learned, updates=10_000, squares=squares), learning.LEARNING_RATES[form]
    for size in (1.0, 2.0, 5.0, 1e3):
        signs = {name: 1 - 2 * torch.randint(2, x.shape) for name, x in settled.difference.items()}
        difference, _ = learning.updated_weights(settled, {name: size * sign for name, sign in signs.items()})
        steps = min({"full": 3, "small": 10}[form], size / (0.9925 + 0.0075 * size**2) ** 0.5)
        for name, sign in signs.items():
            torch.testing.assert_close(difference[name].float(), -0.9997 * rate * steps * sign, rtol=2e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_difference_is_bounded_whatever_the_gradients_are(form: Form) -> None:
    """A number of each weight gets nothing but the largest updates: it grows, and at the bound it stays."""
    learned = learning_memory(made(), form).learned
    assert learned is not None
    bound = 10 * learning.LEARNING_RATES[form] / learning.DECAY
    assert bound < LARGEST_DIFFERENCE
    gradients = {name: torch.zeros(x.shape) for name, x in learned.difference.items()}
    for x in gradients.values():
        x.view(-1)[0] = -1e3
    settled = replace(learned, updates=10_000)
    for share in (0.0, 0.1, 0.5, 0.99, 1.0):
        begun = {name: torch.full_like(x, share * bound) for name, x in learned.difference.items()}
        difference, _ = learning.updated_weights(replace(settled, difference=begun), gradients)
        firsts = [(float(begun[name].view(-1)[0]), float(x.view(-1)[0])) for name, x in difference.items()]
        assert all(after <= max(before, bound) for before, after in firsts)
        if share == 0:
            assert max(after for _, after in firsts) == pytest.approx(10 * learning.LEARNING_RATES[form], rel=1e-3)


def test_what_is_learned_by_wild_gradients_stays_within_the_bound() -> None:
    learned = learning_memory(made(), "small").learned
    assert learned is not None
    for number in range(300):
        size = 10.0 ** (number % 40 - 20)
        gradients = {name: torch.full(x.shape, size) for name, x in learned.difference.items()}
        difference, squares = learning.updated_weights(learned, gradients)
        learned = replace(learned, difference=difference, squares=squares, updates=number + 1)
    largest = max(float(x.abs().max()) for x in learned.difference.values())
    assert 0 < largest < 10 * learning.LEARNING_RATES["small"] / learning.DECAY
