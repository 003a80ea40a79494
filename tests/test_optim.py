"""The optimizers: who updates what, and that a stored state goes on the same."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from processes import server
from torch import distributed
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.lr_scheduler import LambdaLR

from mmrec.model import ModelConfig, RecurrentLM
from mmrec.training.muon import BatchedMuon, orthogonalize, shared_out
from mmrec.training.optim import CombinedOptimizer, make_optimizer, split_parameters
from mmrec.training.options import OptimizerOptions
from mmrec.training.schedule import learning_rate_share

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


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def plain(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what :func:`orthogonalize` does of one matrix, step by step in float64."""
    if matrix.shape[0] > matrix.shape[1]:
        tall: torch.Tensor = plain(matrix.T, steps).T
        return tall
    a, b, c = COEFFICIENTS
    x: torch.Tensor = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (16, 80), (80, 16), (1, 9)])
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7])
def test_matrices_of_one_shape_are_orthogonalized_as_each_alone(shape: tuple[int, int], steps: int) -> None:
    # Singular values over four orders of magnitude, as gradients have them.
    spread = torch.logspace(0, -4, min(shape))
    matrices = torch.stack([(torch.randn(shape[0], min(shape)) * spread) @ torch.randn(min(shape), shape[1])] * 3)
    matrices[1] = torch.randn(shape)
    found = orthogonalize(matrices, COEFFICIENTS, steps, 1e-7)
    for one, expected in zip(found, (plain(matrix, steps) for matrix in matrices), strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=2e-3)
    for matrix, one in zip(matrices, orthogonalize(matrices.bfloat16(), COEFFICIENTS, steps, 1e-7), strict=True):
        expected = plain(matrix, steps)
        of_torch = _zeropower_via_newtonschulz(matrix.clone(), COEFFICIENTS, steps, 1e-7)
        error, error_of_torch = (float((found - expected).norm() / expected.norm()) for found in (one, of_torch))
        assert error < error_of_torch + 0.02


def _share(rank: int, rendezvous: Path, results: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    counts = []

    same = []
    for count in (1, 2, 5):
        matrices = torch.randn(count, 24, 16).bfloat16()

        def counted(mine: range, matrices: torch.Tensor = matrices) -> torch.Tensor:
            counts.append(len(mine))
            return orthogonalize(matrices[mine.start : mine.stop], COEFFICIENTS, 5, 1e-7)

        found = shared_out(count, counted)
        same.append(torch.equal(found, orthogonalize(matrices, COEFFICIENTS, 5, 1e-7)))
    results.put((rank, counts, same))
    distributed.destroy_process_group()


def test_each_process_orthogonalizes_a_share_to_the_same_bits(tmp_path: Path) -> None:
    context = server()
    results = context.Queue()
    processes = [context.Process(target=_share, args=(rank, tmp_path / "meet", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == [(0, [1, 1, 3], [True] * 3), (1, [0, 1, 2], [True] * 3)]


def test_matrices_of_low_rank_stay_finite() -> None:
    matrices = torch.zeros(3, 8, 64)
    matrices[1] = torch.outer(torch.ones(8), torch.ones(64))
    matrices[2] = 1e-30
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalize(matrices.to(dtype), COEFFICIENTS, 5, 1e-7)
        assert bool(found.isfinite().all())
        assert not found[0].any()


def muons() -> tuple[list[torch.nn.Parameter], torch.optim.Muon, list[torch.nn.Parameter], torch.optim.Muon]:
    """Return torch's Muon and ours, each with parameters of the same values."""
    shapes = [(16, 16), (64, 16), (16, 64), (64, 16), (16, 16), (24, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    return theirs, torch.optim.Muon(theirs, **options), ours, BatchedMuon(ours, **options)


def test_muon_by_shapes_updates_as_that_of_torch() -> None:
    theirs, reference, ours, batched = muons()
    before = [parameter.detach().clone() for parameter in ours]
    for _ in range(4):
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):  # the last has no gradient
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        reference.step()
        batched.step()
    for mine, other, first in zip(ours, theirs, before, strict=True):
        assert float((mine - other).detach().norm()) <= 0.1 * float((other - first).detach().norm())
    assert torch.equal(ours[-1], before[-1])


def test_either_muon_continues_what_the_other_began() -> None:
    theirs, reference, ours, batched = muons()
    for parameter in (*theirs, *ours):
        parameter.grad = torch.ones_like(parameter)
    reference.step()
    batched.load_state_dict(copy.deepcopy(reference.state_dict()))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(batched.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"])
    batched.step()
    reference.load_state_dict(copy.deepcopy(batched.state_dict()))
    reference.step()


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
