"""The fast path of writing text against the plain model: logits and state, from any state, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmrec.model import RGLRU, ModelConfig, RecurrentLayer, RecurrentLM
from mmrec.model.decode import STEPS, Decoder


def trained(config: ModelConfig, tokens: int = 11) -> RecurrentLM:
    """A model whose every number, biases and norms too, is something else than at the start."""
    net = RecurrentLM(config, tokens).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


SHAPES = {
    "both": ModelConfig(dim=24, layers=3, layer_types=("short", "long"), heads=3, ffn_dim=20),
    "no convolution": ModelConfig(dim=16, layers=2, layer_types=("long", "short"), heads=2, ffn_dim=24, conv_width=1),
    "untied": ModelConfig(
        dim=16, layers=1, layer_types=("long",), heads=1, ffn_dim=8, conv_width=2, tie_embeddings=False
    ),
    "negative": ModelConfig(dim=16, layers=2, layer_types=("long",), heads=2, ffn_dim=8, negative_eigenvalues=True),
    "counts": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=8, count_half_lives=(20, 300)),
    "portable": ModelConfig(dim=16, layers=2, layer_types=("portable", "short"), heads=2, ffn_dim=8),
}


def assert_same(net: RecurrentLM, read: int, then: int = 9) -> None:
    tokens = torch.randint(11, (1, read + then))
    with torch.no_grad():
        state = net.zero_state(1)
        if read:
            _, state = net(tokens[:, :read], state)
        expected, after = net(tokens[:, read:], state)
    before = [tuple(part.clone() for part in layer) for layer in state]
    decoder = Decoder(net, state)
    found = torch.stack([decoder.step([int(token)])[0].clone() for token in tokens[0, read:]])
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)
    for layer, wanted, untouched, given in zip(decoder.state(), after, before, state, strict=True):
        for a, b in zip(layer, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(untouched, given, strict=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("read", [0, 1, 3, 50])
def test_token_by_token_is_what_the_model_computes(name: str, read: int) -> None:
    assert_same(trained(SHAPES[name]), read)


@pytest.mark.parametrize("name", SHAPES)
def test_the_numbers_of_a_text_are_the_same_to_the_bit_in_any_company(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of shapes whose rows end within what is computed at once, and by a layer's own ``forward``."""
    net, texts, tokens = trained(SHAPES[name]), 7, torch.randint(11, (7, 12))
    if name == "both":
        kind: type[RecurrentLayer] = RGLRU
        monkeypatch.delitem(STEPS, kind)
    with torch.no_grad():
        _, state = net(tokens[:, :5], net.zero_state(texts))

    def decoded(first: int, last: int) -> tuple[Tensor, list[Tensor]]:
        decoder = Decoder(net, [(past[first:last], memory[first:last]) for past, memory in state])
        logits = [decoder.step(column).clone() for column in tokens[first:last, 5:].T.tolist()]
        return torch.stack(logits, dim=1), [part for layer in decoder.state() for part in layer]

    alone = [decoded(text, text + 1) for text in range(texts)]
    for count in (2, 3, texts):
        logits, states = decoded(0, count)
        assert all(torch.equal(logits[text], alone[text][0][0]) for text in range(count))
        for part, parts in zip(states, zip(*(own for _, own in alone[:count]), strict=True), strict=True):
            assert torch.equal(part, torch.cat(parts))


def test_a_memory_without_a_fast_step_takes_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: type[RecurrentLayer] = RGLRU
    monkeypatch.delitem(STEPS, kind)
    assert_same(trained(SHAPES["both"]), 5)


def test_the_state_that_comes_out_goes_in_again() -> None:
    net = trained(SHAPES["both"])
    tokens = torch.randint(11, (20,)).tolist()

    def logits(parts: list[list[int]]) -> Tensor:
        state, found = net.zero_state(1), []
        for part in parts:
            decoder = Decoder(net, state)
            found += [decoder.step([token])[0].clone() for token in part]
            state = decoder.state()
        return torch.stack(found)

    torch.testing.assert_close(logits([tokens[:7], tokens[7:]]), logits([tokens]))


def test_no_weights_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    net = trained(SHAPES["both"])
    decoder = Decoder(net, net.zero_state(1))
    own = {parameter.data_ptr() for parameter in net.parameters() if parameter.dim() == 2 and len(parameter) > 20}

    def matrices(thing: Any) -> list[Tensor]:
        return [value for value in vars(thing).values() if isinstance(value, Tensor) and value.dim() == 2]

    used = {matrix.data_ptr() for thing in (decoder, *decoder.steps) for matrix in matrices(thing)}
    linear = {m.weight.data_ptr() for m in net.modules() if isinstance(m, nn.Linear) and len(m.weight) > 20}
    assert linear <= used
    assert used & own
