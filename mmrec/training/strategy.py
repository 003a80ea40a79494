"""A model sharded across all processes: each keeps a part of every weight and of the optimizer's state."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mmrec.core.errors import UserError
from mmrec.core.files import staged_folder
from mmrec.model import RecurrentLM
from mmrec.training.compat import shard_over_all_processes
from mmrec.training.mtp import MTPHead


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) over the processes of all machines.

    Lightning's own default shards the model across the processes of each machine, and replicates it over machines.

    Args:
        save_distributed_checkpoint: write a folder with a file a process; else one file, gathered on the first.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        module = self.lightning_module
        assert module is not None
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                raise UserError(
                    f"{type(callback).__name__} needs a model that is not sharded: leave it out by "
                    f"--trainer.callbacks null, or train without trainer/fsdp"
                )
        options: Any = getattr(module, "options", None)  # of RecurrentLMModule
        if module.trainer.training and options is not None and options.optimizer == "muon":
            raise UserError(
                "model.optimizer is muon, which needs whole matrices; with a model sharded across processes give "
                "--model.optimizer adamw, as trainer/fsdp does"
            )
        shard_over_all_processes(self)
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, and rename once all processes are done; the one that was there is kept."""
        target = Path(self.broadcast(filepath))
        keep = target.with_name("previous.ckpt") if target.name == "last.ckpt" else None
        with staged_folder(target, keep) if self.is_global_zero else nullcontext(target) as folder:
            super().save_checkpoint(checkpoint, self.broadcast(folder), storage_options)
            self.barrier()
        self.barrier()


StrategyRegistry.register("sharded", FullyShardedStrategy, description="a model sharded across all processes (FSDP2)")


def shard(net: RecurrentLM, mtp_head: MTPHead | None, mesh: DeviceMesh) -> None:
    """Shard the weights, layer by layer, across the processes of ``mesh``; a layer is gathered while it runs."""
    # Here: others need not wait for what it imports.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    blocks: nn.ModuleList = net.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "hidden")
    if mtp_head is not None:
        fully_shard(mtp_head, mesh=mesh)
