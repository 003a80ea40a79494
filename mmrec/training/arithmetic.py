"""What the last digits of a run depend on beside its numbers: threads, and the kernels that compute it on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmrec.core.threads import use_threads
from mmrec.model.ops import dispatch

DIFFERS = "its figures can differ in the last digits from those of a run that was not stopped"


def arithmetic() -> dict[str, Any]:
    """Return what is in force, for a checkpoint: plain values."""
    return {"threads": torch.get_num_threads(), "native": dispatch.uses_native()}


def choose_arithmetic(trainer: Trainer, dim: int, before: dict[str, Any] | None = None) -> None:
    """Compute with as many threads as pay for the batches of this run, and by the compiled kernels where there are.

    Args:
        trainer: of the run.
        dim: width of the model, D.
        before: what :func:`arithmetic` returned in the run that is resumed. It is kept where that is possible, and a
            line says where it is not: sums that others add up differ in their last bits.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    known = None if before is None else before.get("threads")
    threads = use_threads(dim, data.rows * data.options.seq_len, trainer.num_devices, known)
    if known is not None and threads != known:
        rank_zero_info(f"The run was trained with {known} thread(s) until now, and goes on with {threads}: {DIFFERS}")
    compiled = before is None or before.get("native", False)
    found, is_cpu = dispatch.choose_native(compiled), trainer.strategy.root_device.type == "cpu"
    if before is not None and found != compiled and is_cpu:
        rank_zero_info(
            f"The run was trained with compiled kernels until now, and goes on without: "
            f"{dispatch.native_problem() or 'MMREC_NATIVE=0'}; {DIFFERS}"
        )
    elif before is None and not found and is_cpu and trainer.training and dispatch.native_problem():
        rank_zero_info(f"Training takes more than twice as long as it could: {dispatch.native_problem()}")
