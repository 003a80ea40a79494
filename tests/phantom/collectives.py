"""Collectives between simulated devices of several processes: what NCCL would do, done by gloo on the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

METHODS = {
    "allreduce": "allreduce",
    "allreduce_coalesced": "allreduce_coalesced",
    "broadcast": "broadcast",
    "allgather": "allgather",
    "allgather_coalesced": "allgather_coalesced",
    "allgather_into_tensor_coalesced": "allgather_into_tensor_coalesced",
    "_allgather_base": "_allgather_base",
    "all_gather_single": "_allgather_base",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "_reduce_scatter_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
    "alltoall": "alltoall",
    "alltoall_base": "alltoall_base",
    "all_to_all_single": "alltoall_base",
    "send": "send",
    "recv": "recv",
}
"""Methods of a process group, by the names that torch calls them by, and gloo's."""
NAME = "simulated_nccl"


def _host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ops.simulated_cuda.host(value.detach()) if value.is_cuda else value
    return [_host(one) for one in value] if isinstance(value, list | tuple) else value


class SimulatedNCCL(distributed.ProcessGroup):
    """A process group for the CPU and the simulated devices, by gloo."""

    def __init__(self, rank: int, size: int, gloo: Any) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.gloo = gloo

    def getBackendName(self) -> str:
        return NAME

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.gloo.barrier(distributed_c10d.BarrierOptions())


def _method(name: str) -> Any:
    def call(self: SimulatedNCCL, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.gloo, name)(*map(_host, args), **{key: _host(value) for key, value in kwargs.items()})

    return call


def _allreduce(self: SimulatedNCCL, tensors: Any, options: Any = None, **kwargs: Any) -> Any:
    """Average integers, too, which NCCL does and gloo does not."""
    options = kwargs.pop("opts", options) or distributed_c10d.AllreduceOptions()
    tensors = tensors if isinstance(tensors, list) else [tensors]
    averages = options.reduceOp == distributed.ReduceOp.AVG and not tensors[0].is_floating_point()
    if averages:
        options.reduceOp = distributed.ReduceOp.SUM
    work = self.gloo.allreduce(_host(tensors), options)
    if averages:
        work.wait()
        for tensor in _host(tensors):
            tensor.div_(self.size(), rounding_mode="floor")
    return work


def install() -> None:
    """Let torch use such groups, whatever backend a program names."""
    for name in ("group_name", "pg_name"):
        setattr(SimulatedNCCL, name, property(lambda group: distributed_c10d._world.pg_names[group]))
    for name, by in METHODS.items():
        setattr(SimulatedNCCL, name, _method(by))
    SimulatedNCCL.allreduce = _allreduce  # type: ignore[assignment]
    begin, another = distributed_c10d.init_process_group, distributed_c10d.new_group

    def make(options: Any, _: Any) -> Any:
        gloo = distributed_c10d.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, timeout=options.timeout
        )
        group: Any = SimulatedNCCL(options.group_rank, options.group_size, gloo)
        group._set_group_name(options.group_id)
        return group

    def init_process_group(backend: Any = None, device_id: Any = None, **kwargs: Any) -> None:
        begin(NAME, **kwargs)

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return another(ranks, timeout, backend if backend == "gloo" else NAME, **kwargs)

    distributed.Backend.register_backend(NAME, make, extended_api=True, devices=["cpu", "cuda"])
    for module in (distributed, distributed_c10d):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]
        module.new_group = new_group  # type: ignore[attr-defined]
