"""A model cut over all processes: each keeps a part of every weight and of the optimizer's state."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mmrec.core.errors import UserError
from mmrec.core.files import staged_folder
from mmrec.model import RecurrentLM
from mmrec.training.mtp import MTPHead


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) over the processes of all machines.

    Lightning's own default would cut the matrices of a machine's processes instead.

    Args:
        save_distributed_checkpoint: write a folder with a file a process; else one file, gathered on the first.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        for callback in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                raise UserError(
                    f"{type(callback).__name__} averages a model that is whole in each process: leave it out by "
                    f"--trainer.callbacks null, or train without trainer/fsdp"
                )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, and rename once all processes are done; the one that was there is kept."""
        target = Path(self.broadcast(filepath))
        keep = target.with_name("previous.ckpt") if target.name == "last.ckpt" else None
        with staged_folder(target, keep) if self.is_global_zero else nullcontext(target) as folder:
            super().save_checkpoint(checkpoint, self.broadcast(folder), storage_options)
            self.barrier()
        self.barrier()


StrategyRegistry.register("sharded", FullyShardedStrategy, description="a model cut over all processes (FSDP2)")


def shard(net: RecurrentLM, second: MTPHead | None, mesh: DeviceMesh) -> None:
    """Cut the weights, layer by layer, over the processes of ``mesh``; a layer is whole while it runs."""
    blocks: nn.ModuleList = net.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "hidden")
    if second is not None:
        fully_shard(second, mesh=mesh)
