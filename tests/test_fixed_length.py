"""A pass of fixed length beside the model's own forward and autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from native_marks import needs_compiler, needs_tiles
from torch import Tensor

from mmrec.model import ModelConfig, RecurrentLM, State
from mmrec.model.layers import FeedForward
from mmrec.model.ops import dispatch
from mmrec.model.without_autograd.fixed_length import FixedLengthPass, has_fixed_length_pass

FORMS = [
    ModelConfig(dim=32, layers=4, layer_types=("short", "long"), heads=2, ffn_dim=40),
    ModelConfig(dim=32, layers=3, layer_types=("portable", "short"), heads=2, ffn_dim=40, tie_embeddings=False),
    ModelConfig(dim=20, layers=2, layer_types=("long", "short"), heads=1, ffn_dim=13, conv_width=1),
    ModelConfig(dim=32, layers=2, heads=2, ffn_dim=40, count_half_lives=(20, 300)),
]
LENGTH = 70


def made(config: ModelConfig = FORMS[0]) -> RecurrentLM:
    torch.manual_seed(0)
    net = RecurrentLM(config, 11).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def begun(net: RecurrentLM) -> State:
    """A state as it may be in the midst of a text."""
    state = [(torch.randn_like(past), torch.randn_like(memory)) for past, memory in net.zero_state(1)]
    if net.counts is not None:  # of which numbers below zero make no sense
        state[-1] = net.counts.read(torch.randint(11, (1, 50)), net.counts.zero_state(1, state[0][0].device))[1]
    return state


@needs_compiler
@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("learns_all", [True, False])
def test_it_computes_what_the_model_and_autograd_do(config: ModelConfig, learns_all: bool) -> None:
    net = made(config)
    learns = {name: x for name, x in net.named_parameters() if learns_all or x.dim() == 1 or "embedding" in name}
    gradients = {name: torch.full_like(x, torch.nan) for name, x in learns.items()}
    fixed = FixedLengthPass(net, LENGTH, gradients=gradients)
    state = begun(net)
    for number in range(2):  # the second after the weights have changed
        with torch.no_grad():
            for parameter in learns.values():
                parameter.add_(0.01 * number)
        tokens, to_logits = torch.randint(11, (LENGTH,)), torch.randn(LENGTH, 11)
        logits, after = net(tokens[None], state)
        expected = torch.autograd.grad((logits[0] * to_logits).sum(), list(learns.values()))
        found = fixed.read(tokens, state)
        fixed.differentiate(to_logits)
        torch.testing.assert_close(fixed.logits, logits[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, after, rtol=1e-6, atol=1e-6)
        for name, gradient in zip(learns, expected, strict=True):
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        state = found


def distance(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return how far each of ``found`` is from ``exact``, as a share of its norm."""
    return [
        float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True) if other.any()
    ]


@needs_tiles
@pytest.mark.parametrize("config", FORMS)
def test_by_tiles_of_bfloat16_it_is_as_exact_as_autocast(config: ModelConfig) -> None:
    """Outputs, the state, gradients: no further from float32 than what torch computes with products of bfloat16."""
    net = made(config)
    names, learns = zip(*net.named_parameters(), strict=True)
    gradients = {name: torch.full_like(x, torch.nan) for name, x in zip(names, learns, strict=True)}
    fixed = FixedLengthPass(net, LENGTH, gradients=gradients, dtype=torch.bfloat16)
    state = begun(net)
    for number in range(2):  # the second after the weights have changed
        with torch.no_grad():
            for parameter in learns:
                parameter.add_(0.01 * number)
        tokens, to_logits = torch.randint(11, (LENGTH,)), torch.randn(LENGTH, 11)

        def computed(narrow: bool, tokens: Tensor = tokens, to_logits: Tensor = to_logits) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow), dispatch.without_native():
                logits, after = net(tokens[None], state)
            of = torch.autograd.grad((logits[0].float() * to_logits).sum(), learns)
            return [logits[0].detach().float(), *(each.detach() for layer in after for each in layer), *of]

        exact, by_autocast = computed(False), computed(True)
        after = fixed.read(tokens, state)
        fixed.differentiate(to_logits)
        found = [fixed.logits, *(each for layer in after for each in layer), *gradients.values()]
        assert 0 < sum(distance(found, exact)) < sum(distance(by_autocast, exact))


@needs_compiler
def test_a_pass_that_learns_nothing_writes_logits_where_it_is_told() -> None:
    net, logits = made(), torch.zeros(LENGTH, 11)
    tokens, state = torch.randint(11, (LENGTH,)), net.zero_state(1)
    expected, after = net(tokens[None], state)
    found = FixedLengthPass(net, LENGTH, logits).read(tokens, state)
    torch.testing.assert_close(logits, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, after, rtol=1e-6, atol=1e-6)


def test_what_is_not_known_is_not_taken() -> None:
    class Other(FeedForward):
        pass

    changed, hooked = made(), made()
    changed.blocks[0].ffn = Other(32, 40)
    hooked.get_submodule("blocks.0.ffn.project").register_forward_hook(lambda *_: None)
    assert [has_fixed_length_pass(net) for net in (changed, hooked, made().double())] == [False] * 3
    assert has_fixed_length_pass(made()) == dispatch.has_native(torch.float32)
    with dispatch.without_native():
        assert not has_fixed_length_pass(made())
