"""Muon with the matrices of one shape orthogonalized at once: torch's optimizer, in fewer and larger operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Muon

from mmrec.core.runtime import MIXED, native_precision


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
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class BatchedMuon(Muon):
    """torch's Muon with its options and its state, so that either continues what the other began.

    It orthogonalizes in bfloat16, as torch's, but on processors without units for it in float32: there bfloat16 is
    emulated, and slower. Of several processes each orthogonalizes a share of the matrices, and all get the results.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape, parameter.device, parameter.dtype].append(parameter)
            for parameters in shapes.values():
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update ``parameters``, which are of one shape."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        averages = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        sharded, parameters = parameters[0], [_local(parameter) for parameter in parameters]
        momentum = group["momentum"]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, averages, momentum) if group["nesterov"] else averages
        matrices = torch.stack(list(directions)).to(_dtype(parameters[0].device))

        def orthogonal(whole: Tensor) -> Tensor:
            return orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if sharded is not parameters[0]:
            updates = _by_matrices(matrices, sharded, orthogonal)
        elif distributed.is_initialized() and distributed.get_world_size() > 1:
            updates = shared_out(matrices, orthogonal)
        else:
            updates = orthogonal(matrices)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # Scaled to the size of AdamW's (Liu et al. 2025).
        scale = 0.2 * max(sharded.shape) ** 0.5
        torch._foreach_add_(parameters, updates.to(parameters[0].dtype).unbind(), alpha=-group["lr"] * scale)


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process has, in the same memory; another is returned itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def shared_out(matrices: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what ``function`` makes of matrices [M, rows, columns] that all processes hold, a share in each."""
    share = -(-len(matrices) // distributed.get_world_size())
    mine = matrices[share * distributed.get_rank() :][:share]
    own = matrices.new_zeros(share, *matrices.shape[1:])
    gathered = matrices.new_empty(share * distributed.get_world_size(), *matrices.shape[1:])
    if len(mine):
        own[: len(mine)] = function(mine)
    distributed.all_gather_into_tensor(gathered, own)
    return gathered[: len(matrices)]


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
