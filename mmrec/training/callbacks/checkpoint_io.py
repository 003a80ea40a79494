"""CheckpointIO plugin: how Lightning writes and reads the files of :mod:`mmrec.checkpoints.checkpoint`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mmrec.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from mmrec.checkpoints.runs import LAST, PREVIOUS
from mmrec.core.errors import UserError


class DurableCheckpointIO(TorchCheckpointIO):
    """CheckpointIO plugin whose files are whole or absent, also after a power failure, and run no code when read.

    Lightning's own stages in the folder of temporary files and does not synchronize: a full disk or a kill leaves
    half a file.

    Args:
        go_on: a save that fails is reported, and training goes on; the next save tries again.
        damaged: a ``last.ckpt`` that must not become the previous one, which is whole.
        verified: a checkpoint whose sha256 this process has compared already.
    """

    def __init__(self, go_on: bool = False, damaged: Path | None = None, verified: Path | None = None) -> None:
        super().__init__()
        self.go_on = go_on
        self.damaged = damaged
        self.verified = verified

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        keeps = target.name == f"{LAST}.ckpt" and target != self.damaged
        try:
            write_checkpoint(checkpoint, target, target.with_name(f"{PREVIOUS}.ckpt") if keeps else None)
            if target == self.damaged:
                self.damaged = None  # it is whole now
        except UserError as error:
            if not self.go_on:
                raise
            # To the terminal itself: a save that failed is worth a line, whatever becomes of log messages.
            print(f"\n{error}; training goes on, the next save tries again", file=sys.stderr, flush=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # On the CPU, whatever device it was saved from: each process moves what it needs to a device of its own.
        verify = Path(path) != self.verified
        content = read_checkpoint(Path(path), "cpu", verify=verify)
        # Lightning brings old checkpoints to its present form, by their version; a model alone has nothing of it.
        return {"pytorch-lightning_version": lightning.__version__} | content
