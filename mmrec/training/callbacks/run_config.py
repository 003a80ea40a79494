"""The config of a run, written into its folder."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from mmrec.checkpoints import runs
from mmrec.core.files import staged_file


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml into the folder of a run that trains, whatever logger it has, or none.

    Lightning writes into the logger's folder, and refuses to replace the config of a resumed run (issue 17115).
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning would save here, before the checkpoint has been compared with what was asked for."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        config.ckpt_path = None  # by this config another run trains from the begin, also where this one was resumed
        # Whole or not at all, as the run is resumed by what stands there.
        with staged_file(self.folder / runs.CONFIG, parents=True) as file:
            self.parser.save(config, file.name, skip_none=False, overwrite=True)
