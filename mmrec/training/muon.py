"""Muon with the matrices of one shape orthogonalized at once: torch's optimizer, in fewer and larger operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Muon

from mmrec.core.runtime import MIXED, native_precision
from mmrec.core.threads import share_out
from mmrec.model.ops import dispatch
from mmrec.training.exchange import gather_all

GRAM_PAYS = 2
"""Columns a row from which on iterating over X X^T alone takes fewer multiplications than over X."""

EXACT_STEPS = 5
"""Iterations over X X^T alone, after which it is made anew: what rounding leaves of small values grows twelvefold."""


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return nearly orthogonal matrices with the singular vectors of ``matrices``, by Newton-Schulz iterations.

    The same as :class:`torch.optim.Muon` computes for each of them: X <- a X + (b R + c R R) X with R = X X^T, from X
    of norm 1.

    Args:
        matrices: [M, rows, columns]; it is computed in their dtype.
        coefficients: a, b and c.
        steps: number of iterations.
        eps: least norm that is divided by.
    """
    if matrices.shape[1] > matrices.shape[2]:
        tall: Tensor = orthogonalize(matrices.mT, coefficients, steps, eps).mT
        return tall
    a, b, c = coefficients
    x: Tensor = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=eps)
    if x.shape[2] >= GRAM_PAYS * x.shape[1] and x.dtype != torch.bfloat16:
        for step in range(0, steps, EXACT_STEPS):
            x = _polynomial(x @ x.mT, coefficients, min(EXACT_STEPS, steps - step)) @ x
        return x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return what ``steps`` iterations multiply X by, from the small ``gram`` = X X^T [M, rows, rows] alone.

    All are polynomials of one symmetric matrix, so their order does not matter. In bfloat16 what rounding leaves
    of a small eigenvalue may be negative, and would grow.
    """
    a, b, c = coefficients
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)

    def factor_of(gram: Tensor) -> Tensor:
        return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity

    product = factor = factor_of(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    return product


class BatchedMuon(Muon):
    """torch's Muon with its options and its state, so that either continues what the other began.

    It orthogonalizes in bfloat16, as torch's, but on processors without units for it in float32: there bfloat16 is
    emulated, and slower. Where there are compiled kernels for it (:mod:`mmrec.model.ops.native.muon`), they do all.
    Of several processes each orthogonalizes a share of the matrices, and all get the results.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            if kernels := dispatch.native_muon([*parameters, *gradients, *averages]):
                _update_by_kernels(kernels, group, parameters, gradients, averages)
                continue
            shapes: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in parameters:
                shapes[parameter.shape, parameter.device, parameter.dtype].append(parameter)
            for alike in shapes.values():
                updates = self._by_torch(group, alike)
                decay, rate = _factors(group, alike[0])
                local = [_local(parameter) for parameter in alike]
                torch._foreach_mul_(local, decay)
                torch._foreach_add_(local, updates.to(local[0].dtype).unbind(), alpha=-rate)
        return loss

    def _by_torch(self, group: dict[str, Any], parameters: list[Tensor]) -> Tensor:
        """Return the nearly orthogonal matrices [M, rows, columns]; of a sharded model the rows of this process."""
        averages = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momentum = group["momentum"]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, averages, momentum) if group["nesterov"] else averages
        matrices = torch.stack(list(directions)).to(_dtype(gradients[0].device))

        def orthogonal(whole: Tensor) -> Tensor:
            return orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if _local(parameters[0]) is not parameters[0]:
            return _by_matrices(matrices, parameters[0], orthogonal)
        return shared_out(len(matrices), lambda mine: orthogonal(matrices[mine.start : mine.stop]))


def _update_by_kernels(
    kernels: ModuleType,
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
) -> None:
    """Update ``parameters`` by compiled code; of several processes each orthogonalizes some, in bfloat16."""
    numbers = (group[name] for name in ("eps", "momentum"))
    how = kernels.Momentum(group["ns_steps"], group["nesterov"], *group["ns_coefficients"], *numbers)
    processes, rank = _processes()
    owners, starts, room = _places(tuple(parameter.shape for parameter in parameters), processes)
    mine = [start if owner == rank else -1 for owner, start in zip(owners, starts, strict=True)]
    updates = torch.empty(room, dtype=torch.bfloat16)
    kernels.orthogonalize(how, gradients, averages, mine, updates)
    if processes > 1:
        updates = gather_all(updates)
    places = [owner * room + start for owner, start in zip(owners, starts, strict=True)]
    factors = [_factors(group, parameter) for parameter in parameters]
    kernels.apply(parameters, factors[0][0], [rate for _, rate in factors], places, updates)


@cache
def _places(shapes: tuple[torch.Size, ...], processes: int) -> tuple[list[int], list[int], int]:
    """Return which process orthogonalizes each matrix, where among its numbers that begins, and how many those are.

    The last is the most that a process has: all give as many.
    """
    owners = share_out([min(shape) * shape.numel() for shape in shapes], processes)
    ends, starts = [0] * processes, []
    for shape, owner in zip(shapes, owners, strict=True):
        starts.append(ends[owner])
        ends[owner] += shape.numel()
    return owners, starts, max(ends)


def _factors(group: dict[str, Any], parameter: Tensor) -> tuple[float, float]:
    """Return what a parameter is multiplied by, and the rate of its update: scaled to AdamW's (Liu et al. 2025)."""
    rate: float = group["lr"]
    return 1 - rate * group["weight_decay"], rate * 0.2 * max(parameter.shape) ** 0.5


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process has, in the same memory; another is returned itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _processes() -> tuple[int, int]:
    """Return how many processes train together, and the number of this one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


def shared_out(count: int, function: Callable[[range], Tensor]) -> Tensor:
    """Return ``count`` results, of which each process computes a share.

    Args:
        count: number of results, the same in all processes.
        function: of the numbers that this process has, possibly none; it returns their results [M, ...].
    """
    processes, rank = _processes()
    if processes == 1:
        return function(range(count))
    share = -(-count // processes)
    found = function(range(min(count, share * rank), min(count, share * (rank + 1))))
    own = found.new_zeros(share, *found.shape[1:])
    own[: len(found)] = found
    return gather_all(own)[:count]


def _by_matrices(parts: Tensor, sharded: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return this process's part of what ``function`` makes of whole matrices, of which each process takes some.

    Args:
        parts: [M, rows here, columns]: of each of M matrices the rows of this process.
        sharded: one of the parameters, whose rows are shared out over the processes in the same way.
        function: of [m, rows, columns].
    """
    from torch.distributed.tensor import DTensor, Shard

    rows, columns = sharded.shape
    shape = torch.Size((len(parts), rows, columns))
    stride = (rows * columns, columns, 1)
    mesh = sharded.device_mesh
    by_rows = DTensor.from_local(parts, mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
    own = function(by_rows.redistribute(placements=[Shard(0)]).to_local())
    by_matrix = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    result: Tensor = by_matrix.redistribute(placements=[Shard(1)]).to_local()
    return result


def _dtype(device: torch.device) -> torch.dtype:
    """Return what matrices on ``device`` are orthogonalized in."""
    accelerator = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    return torch.float32 if accelerator and native_precision(accelerator) != MIXED else torch.bfloat16
