"""A model sharded across all processes: each keeps a part of every weight and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from mmrec.checkpoints.checkpoint import SHARDED_METADATA
from mmrec.core.errors import UserError
from mmrec.core.files import staged_folder
from mmrec.model import RecurrentLM
from mmrec.training.compat import shard_over_all_processes
from mmrec.training.mtp import MTPHead
from mmrec.training.optim import CombinedOptimizer, member_optimizers


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
        shard_over_all_processes(self)
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, and rename once all processes are done; the one that was there is kept."""
        target = Path(self.broadcast(filepath))
        keep = target.with_name("previous.ckpt") if target.name == "last.ckpt" else None
        sharded = {name: checkpoint.pop(name) for name in ("state_dict", "optimizer_states") if name in checkpoint}
        with staged_folder(target, keep) if self.is_global_zero else nullcontext(target) as folder:
            super().save_checkpoint(_on_cpu(checkpoint) | sharded, self.broadcast(folder), storage_options)
            self.barrier()
        self.barrier()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of the optimizer, of the members of a combined one as of one that has all parameters."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        assert self.model is not None
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, member_optimizers(inner), options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the weights and the optimizer's state in place, and return the rest, on the CPU.

        Lightning's own loads the rest onto the device that it was saved from.
        """
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_optimizer_state

        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if not path.is_dir():
            if any(len(member_optimizers(optimizer)) > 1 for optimizer in self.optimizers):
                raise UserError(
                    f"{path}: a run with muon that was not sharded cannot be resumed sharded; resume it as it was "
                    "trained, or begin a run with its weights by --init_from"
                )
            return super().load_checkpoint(path, weights_only)
        weights: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        load(weights, checkpoint_id=path)
        assert self.lightning_module is not None
        self.model.load_state_dict(weights["state_dict"], strict=self.lightning_module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            members, name = member_optimizers(optimizer), f"optimizer_{number}"
            state: dict[str, Any] = {name: get_optimizer_state_dict(self.model, members)}
            load(state, checkpoint_id=path)
            set_optimizer_state(self.model, members, optim_state_dict=state[name])
            if isinstance(optimizer, CombinedOptimizer):
                optimizer.adopt_groups()
        rest: dict[str, Any] = torch.load(path / SHARDED_METADATA, map_location="cpu", weights_only=True)
        return rest


def _on_cpu(content: Any) -> Any:
    """Return the plain values of a checkpoint with their tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, Mapping):
        return {key: _on_cpu(value) for key, value in content.items()}
    return type(content)(map(_on_cpu, content)) if type(content) in (list, tuple) else content


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
