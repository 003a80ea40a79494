"""The optimizers: who updates what, and that a stored state goes on the same."""

from __future__ import annotations

import copy
import itertools
from typing import Literal

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from mmrec.model import ModelConfig, RecurrentLM
from mmrec.training.optim import CombinedOptimizer, learning_rate_share, make_optimizer, split_parameters
from mmrec.training.options import OptimizerOptions

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)


def step(net: RecurrentLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(seed))
    logits, _ = net(x, net.zero_state(2))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    optimizer.step()


def test_every_parameter_is_in_one_group() -> None:
    net = RecurrentLM(SHAPE, 7)
    matrices, embeddings, rest = split_parameters(net)
    assert sorted(map(id, matrices + embeddings + rest)) == sorted(map(id, net.parameters()))
    assert len(embeddings) == 1  # tied
    names = {id(p): name for name, p in net.named_parameters()}
    assert all(p.dim() == 2 and names[id(p)].endswith("weight") for p in matrices)
    assert not any(word in names[id(p)] for p in matrices for word in ("conv", "norm", "embedding"))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_decays_norms_and_biases_do_not_decay(name: Literal["muon", "adamw"]) -> None:
    net = RecurrentLM(SHAPE, 7)
    optimizer = make_optimizer(net, OptimizerOptions(name, 0.1, 0.5))
    free = [p for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    assert sorted(map(id, free)) == sorted(map(id, split_parameters(net)[2]))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_stored_state_goes_on_the_same(name: Literal["muon", "adamw"]) -> None:
    net = RecurrentLM(SHAPE, 7)
    optimizer = make_optimizer(net, OptimizerOptions(name, 1e-2, 0.1))
    for seed in range(3):
        step(net, optimizer, seed)
    other = RecurrentLM(SHAPE, 7)
    other.load_state_dict(net.state_dict())
    again = make_optimizer(other, OptimizerOptions(name, 1e-2, 0.1))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(other, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_schedule_reaches_every_member_also_after_loading() -> None:
    net = RecurrentLM(SHAPE, 7)
    optimizer = make_optimizer(net, OptimizerOptions("muon", 0.1, 0.1))
    assert isinstance(optimizer, CombinedOptimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = LambdaLR(optimizer, lambda number: 1 / (number + 1))
    step(net, optimizer, 0)
    schedule.step()
    assert [group["lr"] for member in optimizer.members for group in member.param_groups] == [0.05] * 3


def test_the_learning_rate_rises_then_falls() -> None:
    options = OptimizerOptions(warmup_steps=10, min_lr_ratio=0.1)
    shares = [learning_rate_share(number, options, 110) for number in range(120)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1
    assert shares[60] == pytest.approx(0.55)
    assert shares[110] == shares[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))
    assert learning_rate_share(0, OptimizerOptions(warmup_steps=0), 0) == 1


def test_the_rate_of_a_run_without_an_end_stays() -> None:
    options = OptimizerOptions(warmup_steps=2)
    assert [learning_rate_share(number, options, None) for number in (0, 1, 2, 10**6)] == [0.5, 1, 1, 1]
