import numpy as np
import pytest
import torch
from native_marks import needs_compiler
from torch import Tensor

from mmrec.checkpoints.cached import DAMPING, MODELS, ORDERS, CachedNgrams
from mmrec.checkpoints.learned import PART
from mmrec.inference.cached_reading import CachedReading
from mmrec.inference.mixing import FORGETTING, features, mix, updated_weights
from mmrec.model.ops import dispatch

T, N, K = 40, 9, len(ORDERS)
M = MODELS + K


def _case() -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [m, T, N], counts [K, T, N] of which longer contexts know less, and tokens."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(MODELS, T, N, generator=random).log_softmax(-1)
    counts = torch.randint(0, 5, (K, T, N), generator=random).float() * (torch.rand(K, T, N, generator=random) < 0.4)
    for order in range(1, K):
        counts[order] *= counts[order - 1] > 0
    return scores, counts, torch.randint(0, N, (T,), generator=random)


def _plain_features(scores: Tensor, counts: Tensor) -> tuple[list[np.ndarray], int]:
    """Return the features [N] of one position and its set, written out."""
    first = np.exp(scores[0].double().numpy())
    found = [np.log(first), scores[1].double().numpy() - np.log(first)]
    known, probabilities = 0, first
    for count in counts.double().numpy():
        after = probabilities
        if count.sum() > 0:
            kinds = (count > 0).sum()
            after = (count + kinds * probabilities) / (count.sum() + kinds)
            known += 1
        found.append(np.log(after) - np.log(probabilities))
        probabilities = after
    return found, known


def test_features_and_mixture_are_those_of_the_plain_formulas() -> None:
    scores, counts, _ = _case()
    weighed, sets = features(scores, counts)
    weights = torch.randn(K + 1, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = mix(weights, weighed, sets)
    for t in range(T):
        plain, known = _plain_features(scores[:, t], counts[:, t])
        assert int(sets[t]) == known
        np.testing.assert_allclose(weighed[:, t], np.stack(plain), atol=2e-5)
        logits = sum(float(w) * feature for w, feature in zip(weights[known], plain, strict=True))
        np.testing.assert_allclose(mixed[t], logits - np.log(np.exp(logits).sum()), atol=1e-4)


def test_weights_move_by_a_newton_step_of_the_loss_of_the_part() -> None:
    scores, counts, targets = _case()
    weighed, sets = (x.double() if x.is_floating_point() else x for x in features(scores, counts))
    start = CachedNgrams.empty(1)
    weights, curvature = updated_weights(start.weights, start.curvature, weighed, sets, targets)

    def loss(one: Tensor, number: int) -> Tensor:
        rows = (sets == number).nonzero().squeeze(-1)
        logits = torch.einsum("m,mtn->tn", one, weighed[:, rows])
        return torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum")

    for number in range(K + 1):
        if not (sets == number).any():
            assert torch.equal(weights[number], start.weights[number])
            continue
        one = start.weights[number].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(one, number), one)
        hessian = torch.autograd.functional.hessian(lambda w, n=number: loss(w, n), start.weights[number])
        wanted = hessian + FORGETTING * start.curvature[number] + (1 - FORGETTING) * DAMPING * torch.eye(M)
        torch.testing.assert_close(curvature[number], wanted, atol=1e-8, rtol=1e-8)
        moved = start.weights[number] - torch.linalg.solve(wanted, gradient)
        torch.testing.assert_close(weights[number], moved, atol=1e-8, rtol=1e-8)


def test_without_counts_the_mixture_is_the_first_model_at_first() -> None:
    scores, counts, _ = _case()
    weighed, sets = features(scores, torch.zeros_like(counts))
    torch.testing.assert_close(mix(CachedNgrams.empty(1).weights, weighed, sets), scores[0], atol=1e-6, rtol=0)


def test_the_mixture_learns_which_member_is_right() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(0, N, (2000,), generator=random)
    good = torch.full((2000, N), -3.0).scatter(1, targets[:, None], 2.0).log_softmax(-1)
    bad = torch.randn(2000, N, generator=random).log_softmax(-1)
    weighed, sets = features(torch.stack([bad, good]), torch.zeros(K, 2000, N))
    state = CachedNgrams.empty(1)
    weights, curvature = state.weights, state.curvature
    for begin in range(0, 2000, 100):
        part = slice(begin, begin + 100)
        weights, curvature = updated_weights(weights, curvature, weighed[:, part], sets[part], targets[part])
    loss = -mix(weights, weighed[:, -100:], sets[-100:])[torch.arange(100), targets[-100:]].mean()
    assert loss < 0.1


def test_numbers_that_are_not_finite_change_nothing() -> None:
    scores, counts, targets = _case()
    weighed, sets = features(scores, counts)
    weighed[0, 3] = float("nan")
    state = CachedNgrams.empty(1)
    weights, curvature = updated_weights(state.weights, state.curvature, weighed, sets, targets)
    assert torch.equal(weights, state.weights)
    assert torch.equal(curvature, state.curvature)


def _readings(models: int) -> tuple[CachedReading, CachedReading, Tensor, Tensor]:
    """Return two readings that have read the same parts, by compiled code and without, and the next part."""
    random = torch.Generator().manual_seed(4)
    said = torch.randint(0, N, (5 * PART,), generator=random)
    said[PART : 2 * PART] = said[:PART]  # of which long contexts know something
    said[-PART + 50 :] = said[3 : PART - 47]
    plain = CachedReading(CachedNgrams.empty(1), N)
    logits = 3 * torch.randn(5, models, PART + 1, N, generator=random)
    logits[:, :, 5] = torch.tensor([30.0, *[-30.0] * (N - 1)])  # as good as certain, and as good as impossible
    for number, part in enumerate(said.split(PART)[:-1]):
        with dispatch.without_native():
            plain.read(logits[number], part, slice(number == 0, None), is_whole=True)
    return CachedReading(plain.ngrams, N), plain, logits[-1], said[-PART:]


@needs_compiler
@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize(("length", "begin"), [(PART, 0), (PART, 1), (37, 0)])
def test_a_part_is_mixed_by_compiled_code_as_by_torch(models: int, length: int, begin: int) -> None:
    compiled, plain, logits, tokens = _readings(models)
    part = logits[:, : length + 1], tokens[:length], slice(begin, None), length == PART
    found = compiled.read(*part)
    with dispatch.without_native():
        expected = plain.read(*part)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled.ngrams.weights, plain.ngrams.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.ngrams.curvature, plain.ngrams.curvature, rtol=1e-4, atol=1e-3)
    assert torch.equal(compiled.ngrams.table, plain.ngrams.table)
    assert torch.equal(compiled.ngrams.history, plain.ngrams.history)
    if length == PART:
        assert not torch.equal(plain.ngrams.weights, CachedNgrams.empty(1).weights)


@needs_compiler
def test_by_compiled_code_numbers_that_are_not_finite_change_nothing() -> None:
    compiled, _, logits, tokens = _readings(2)
    before = compiled.ngrams
    logits[0, 3] = float("nan")
    compiled.read(logits, tokens, slice(0, None), is_whole=True)
    assert torch.equal(compiled.ngrams.weights, before.weights)
    assert torch.equal(compiled.ngrams.curvature, before.curvature)
