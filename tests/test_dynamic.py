"""Dynamic evaluation: scores first and learns then, never ahead, and leaves the model as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit
from torch.nn import functional as F

from mmrec.model import ModelConfig, RecurrentLM, detach_state
from mmrec.training.dynamic import DynamicEvaluation

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)


def nats(net: RecurrentLM, tokens: torch.Tensor, part: int = 16) -> torch.Tensor:
    """Return the nats of every token of a text [T] but the first, learning after each part."""
    dynamic, state, found = DynamicEvaluation(net, learning_rate=1e-2), net.zero_state(1), []
    for start in range(0, len(tokens) - 1, part):
        window = tokens[start : start + part + 1]
        logits, state = net(window[None, :-1], state)
        found.append(F.cross_entropy(logits[0], window[1:], reduction="none"))
        dynamic.learn(found[-1].mean())
        state = detach_state(state)
    dynamic.restore()
    return torch.cat(found).detach()


def test_what_comes_later_changes_no_score() -> None:
    net, tokens = RecurrentLM(SHAPE, 7).eval(), torch.randint(7, (161,))
    other = tokens.clone()
    other[81:] = torch.randint(7, (80,))
    one, two = nats(net, tokens), nats(net, other)
    assert torch.equal(one[:80], two[:80])
    assert not torch.allclose(one[80:], two[80:])


def test_the_first_part_is_scored_before_anything_is_learned() -> None:
    net, tokens = RecurrentLM(SHAPE, 7).eval(), torch.randint(7, (17,))
    logits, _ = net(tokens[None, :-1], net.zero_state(1))
    assert torch.equal(nats(net, tokens), F.cross_entropy(logits[0], tokens[1:], reduction="none").detach())


def test_a_text_that_repeats_itself_is_learned_and_then_forgotten() -> None:
    net, tokens = RecurrentLM(SHAPE, 7).eval(), torch.tensor([0, 3, 1, 5] * 60)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = nats(net, tokens)
    assert found[-50:].mean() < 0.5 * found[:16].mean()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_protocols_of_validate(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec(*fit(prepared, "--run=a", "--trainer.max_epochs=1")) == 0
    losses = {}
    for option in ((), ("--window", 16), ("--dynamic",)):
        capsys.readouterr()
        assert mmrec("validate", "--run=a", "--ckpt_path=best", *option) == 0
        found = re.search(r"validation \((.*?), .*: ([\d.]+) nats/token", capsys.readouterr().out)
        assert found
        losses[found[1]] = float(found[2])
    assert losses["dynamic"] < losses["carried"] < losses["windowed at 16"]
    assert mmrec("validate", "--run=a", "--ckpt_path=best", "--window=0") == 2
    assert mmrec("validate", "--run=a", "--ckpt_path=best", "--window=8", "--dynamic") == 2
    assert "not both" in capsys.readouterr().err
