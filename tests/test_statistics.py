"""What is said of a model's memories is what its recurrences do."""

from __future__ import annotations

import math

import pytest
import torch

from mmrec.model import RGLRU, GatedDeltaNet, ModelConfig, RecurrentLM
from mmrec.model.statistics import layer_statistics

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)


@pytest.fixture
def net() -> RecurrentLM:
    return RecurrentLM(SHAPE, 9, dropout=0.5)


def test_a_half_life_is_what_is_left_after_it(net: RecurrentLM) -> None:
    """Gates that stand still: the state then fades exactly as the half-lives say."""
    short, long = (block.get_submodule("memory") for block in net.blocks)
    assert isinstance(short, RGLRU)
    assert isinstance(long, GatedDeltaNet)
    for recurrent in (short, long):
        torch.nn.init.zeros_(recurrent.project.weight)  # no input: the biases alone set the gates
    torch.nn.init.normal_(short.r_bias)
    torch.nn.init.normal_(long.decay_bias)
    found = layer_statistics(net, torch.randint(9, (10,)))
    assert [layer.kind for layer in found] == ["short", "long"]
    for memory, layer in zip((short, long), found, strict=True):
        past, before = memory.zero_state(1, torch.device("cpu"), torch.float32)
        _, (_, after) = memory(torch.zeros(1, 64, 16), (past, torch.ones_like(before)))
        left = after[0] if layer.kind == "short" else after[0].mean(dim=(1, 2))
        torch.testing.assert_close(left, 0.5 ** (64 / layer.half_lives), rtol=1e-3, atol=1e-6)


def test_new_memories_last_as_long_as_they_are_meant_to(net: RecurrentLM) -> None:
    short, long = layer_statistics(net, torch.randint(9, (200,)))
    assert short.half_lives.min() == pytest.approx(1, rel=0.2)
    assert short.half_lives.max() == pytest.approx(256, rel=0.2)
    assert long.half_lives.tolist() == pytest.approx([8, 8192], rel=0.2)


def test_gates_and_norms(net: RecurrentLM) -> None:
    tokens = torch.randint(9, (50,))
    with torch.no_grad():
        for block in net.blocks:
            block.get_parameter("memory.project.weight").zero_()
        net.blocks[0].get_submodule("memory").get_parameter("i_bias").fill_(math.log(3))
    short, long = layer_statistics(net, tokens)
    assert short.gates == pytest.approx({"recurrence": 0.5, "input": 0.75, "output": 0.5})
    assert long.gates == pytest.approx({"write": 0.5, "output": 0.5})
    assert short.state_norm == long.state_norm == 0  # nothing came in


def test_looking_changes_nothing(net: RecurrentLM) -> None:
    net.train()
    before, weights = torch.get_rng_state(), {name: w.clone() for name, w in net.state_dict().items()}
    first = layer_statistics(net, torch.arange(9))
    second = layer_statistics(net, torch.arange(9))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], w) for name, w in net.state_dict().items())
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(first[0].half_lives, second[0].half_lives)
    _, state = net.eval()(torch.arange(9)[None], net.zero_state(1))
    assert first[1].state_norm == pytest.approx(float(state[1][1].detach().square().mean().sqrt()))
