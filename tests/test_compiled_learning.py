"""Learning by compiled code beside learning by torch: mixture, update, whole texts; which way a memory goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_marks import needs_compiler
from test_learning import FORMS, assert_same, learning_memory, made, read, tiles

from mmrec.checkpoints.learned import PART, Form, LearnedWeights
from mmrec.checkpoints.state_file import load_memory, save_memory
from mmrec.inference import learner, learning
from mmrec.inference.compiled_learning import CompiledLearning, mixing_rule
from mmrec.inference.learning import LearningNet
from mmrec.model import RecurrentLM
from mmrec.model.ops import dispatch
from mmrec.model.ops.native import build
from mmrec.model.ops.native.build import library

__all__ = ["tiles"]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    library.cache_clear()
    dispatch.choose_native()


def learned_of(net: RecurrentLM, form: Form, tokens: torch.Tensor) -> LearnedWeights:
    """Return what ``net`` has learned from ``tokens`` by torch."""
    with dispatch.without_native():
        _, memory = read(net, tokens, learning_memory(net, form))
    assert memory.learned is not None
    return memory.learned


@needs_compiler
@pytest.mark.parametrize("length", [PART, 3 * learning.MIX_BLOCK + 5])
def test_the_mixture_of_a_part(length: int) -> None:
    from mmrec.model.ops.native.learning import mix_part

    net = made()
    learned = learned_of(net, "full", torch.randint(7, (PART,)))
    logits, tokens = 4 * torch.randn(2, length + 1, 7), torch.randint(7, (length,))
    logits[1, :, 3] = -60.0  # as good as impossible
    logits[1, :9, 2] = 40.0  # as good as certain
    found = mix_part(mixing_rule(), logits, tokens, learned.mix, learned.curvature)
    mixture, mix, curvature = learning.mix_part(learned, logits[:, :-1], tokens)
    torch.testing.assert_close(found.scores, logits.log_softmax(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.mixture, mixture.log_softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found.mix, found.curvature), (mix, curvature), rtol=1e-5, atol=1e-5)
    leaf = logits[1, 1:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(leaf[:-1], tokens[1:], reduction="sum") / length, leaf
    )
    # Of what is improbable, too, to its own digits: an update asks for the direction alone.
    torch.testing.assert_close(found.to_logits, expected, rtol=1e-4, atol=1e-38)


@needs_compiler
def test_a_mixture_of_what_is_not_finite_stays() -> None:
    from mmrec.model.ops.native.learning import mix_part

    learned = learned_of(made(), "full", torch.randint(7, (PART,)))
    logits = torch.full((2, PART + 1, 7), torch.nan)
    found = mix_part(mixing_rule(), logits, torch.randint(7, (PART,)), learned.mix, learned.curvature)
    assert torch.equal(found.mix, learned.mix)
    assert not found.curvature.any()


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-3, 30.0])  # as before, and so large that the whole update is bounded
def test_an_update(form: Form, size: float) -> None:
    """Within a step of float16 of the plain one, for differences of all sizes, also below float16's normal ones."""
    net = made()
    learned = learned_of(net, form, torch.randint(7, (2 * PART,)))
    sizes = {name: 10 ** torch.empty(x.shape).uniform_(-9, 0.5) for name, x in learned.difference.items()}
    difference = {name: (x * torch.randn_like(x)).half() for name, x in sizes.items()}
    learned = replace(learned, difference=difference)
    compiled, weights = compiled_of(net, learned)
    for name, gradient in compiled.gradients.items():
        gradient.copy_(torch.randn(gradient.shape) * size)
        gradient.view(-1)[0] = 0
        assert name in learned.difference
    expected, squares = learning.updated_weights(learned, compiled.gradients)
    found, found_squares = compiled.update(learned)
    assert found.keys() == expected.keys()
    assert found_squares.keys() == squares.keys()
    for name, x in found.items():
        step = torch.maximum(expected[name].float().abs() * 2**-10, torch.tensor(2.0**-24))
        assert ((x.float() - expected[name].float()).abs() <= step).all(), name
        assert (x == expected[name]).float().mean() > 0.9
        assert torch.equal(weights.parameters[name], weights.trained[name] + x.float())
    torch.testing.assert_close(found_squares, squares, rtol=1e-5, atol=0)


def compiled_of(net: RecurrentLM, learned: LearnedWeights) -> tuple[CompiledLearning, LearningNet]:
    weights = LearningNet(net, learned.form)
    weights.set_difference(learned.difference)
    return CompiledLearning(net, weights), weights


@needs_compiler
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e15])
def test_a_gradient_that_is_none_changes_nothing(wrong: float) -> None:
    net = made()
    learned = learned_of(net, "full", torch.randint(7, (PART,)))
    compiled, weights = compiled_of(net, learned)
    before = {name: weight.clone() for name, weight in weights.parameters.items()}
    for gradient in compiled.gradients.values():
        gradient.fill_(1e-3)
    list(compiled.gradients.values())[-1].view(-1)[-1] = wrong  # after all others were changed
    difference, squares = compiled.update(learned)
    assert (difference, squares) == (learned.difference, learned.squares)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.parameters.items())


@needs_compiler
@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_learned_as_by_torch(form: Form, tiles: bool) -> None:
    net, tokens = made(), torch.randint(7, (6 * PART + 9,))
    tokens[PART : 5 * PART] = tokens[:PART].repeat(4)
    found, memory = read(net, tokens, learning_memory(net, form))
    with dispatch.without_native():
        expected, by_torch = read(net, tokens, learning_memory(net, form))
    near = 0.01 if tiles else 1e-3
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    assert memory.learned is not None
    assert by_torch.learned is not None
    for name, difference in memory.learned.difference.items():
        plain = by_torch.learned.difference[name].float()
        assert (difference.float() - plain).norm() < (0.05 if tiles else 0.02) * plain.norm(), name
    torch.testing.assert_close(memory.state, by_torch.state, rtol=near, atol=near)


@needs_compiler
@pytest.mark.parametrize("counts", [False, True])
def test_a_memory_begun_without_kernels_goes_on_without(tmp_path: Path, counts: bool) -> None:
    """To the bit as if it had been read at once without them; one begun with them goes on with them."""
    net, tokens, path = made(), torch.randint(7, (4 * PART + 9,)), tmp_path / "a.mem"
    with dispatch.without_native():
        empty = learning_memory(net).caching(1) if counts else learning_memory(net)
        _, plain = read(net, tokens, empty)
        _, begun = read(net, tokens[:200], empty)
        save_memory(path, begun, "hash")
    begun = load_memory(path, net, "hash")
    assert_same(read(net, tokens[200:], begun)[1], plain)
    assert not torch.equal(read(net, tokens, learning_memory(net))[1].logits, plain.logits)
    save_memory(path, learning_memory(net), "hash")
    found = load_memory(path, net, "hash").learned
    assert found is not None
    assert found.compiled


def test_that_kernels_are_gone_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    net, tokens = made(), torch.randint(7, (2 * PART,))
    begun = learning_memory(net)
    assert begun.learned is not None
    begun = replace(begun, learned=replace(begun.learned, compiled=True))
    library.cache_clear()
    monkeypatch.setenv("MMREC_NATIVE", "0")
    learner._say_that_bits_differ.cache_clear()
    for _ in range(2):
        read(net, tokens, begun)
    said = capsys.readouterr().err
    assert said.count("begun with compiled kernels") == 1
    assert "MMREC_NATIVE=0" in said
    read(net, tokens, learning_memory(net))
    assert capsys.readouterr().err == ""


@needs_compiler
def test_where_the_library_for_learning_cannot_be_built_torch_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net, tokens = made(), torch.randint(7, (3 * PART,))
    begun = learning_memory(net).caching(1)
    assert begun.learned is not None
    assert begun.learned.compiled
    _, by_kernels = read(net, tokens, begun)
    monkeypatch.setattr(build, "_failed", {})
    monkeypatch.setitem(build.SOURCES, build.LEARNING, ("nowhere",))
    library.cache_clear()
    learner._say_that_bits_differ.cache_clear()
    _, by_torch = read(net, tokens, begun)
    torch.testing.assert_close(by_torch.logits, by_kernels.logits, rtol=2e-2, atol=2e-2)
    said = capsys.readouterr().err
    assert said.count("begun with compiled kernels") == 1
    assert "nowhere.c" in said
    assert dispatch.has_native(torch.float32)
    assert dispatch.native_problem() is None
    new = learning_memory(net).learned
    assert new is not None
    assert not new.compiled
