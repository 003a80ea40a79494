"""The LightningDataModule: prepares a corpus that does not exist yet, and serves its tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import LightningDataModule

from mmrec.core.errors import UserError
from mmrec.core.urls import is_url
from mmrec.data.batches import Batch, SegmentSampler, StatefulEvalLoader, TrainLoader, WindowedEvalLoader
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare
from mmrec.data.remote_store import open_remote_tokens
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.tokenizers import Tokenizer
from mmrec.training.cores import rows_of_process
from mmrec.training.options import DataOptions, report_changes


@dataclass(frozen=True)
class Evaluation:
    """How a text is scored; by default in one pass with the state carried.

    Args:
        window: in windows of so many tokens, each from the zero state.
        learn: with weights that learn from every part once it is scored.
    """

    window: int | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"--window is {self.window}; it must be at least 1")
        if self.window is not None and self.learn:
            raise UserError("give --window or --learn, not both: what is learned goes with a state that is carried")

    def __str__(self) -> str:
        if self.window is not None:
            return f"windowed at {self.window}"
        return "learned" if self.learn else "carried"

    def part(self, scored: int, tokens: int) -> str:
        """Return which part of a text of ``tokens`` was scored, as words before its name; nothing for all of it."""
        if scored >= tokens - 1:
            return ""
        first = "" if self == Evaluation() else "the first "  # a carried part is of stretches from all over the text
        return f"{first}{scored:,} of {tokens:,} tokens of "


class TextDataModule(LightningDataModule):
    """Token streams of one corpus.

    Args:
        options: the fields of :class:`mmrec.training.options.DataOptions`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = DataOptions(**options)
        self.data_dir = self.options.data_dir or str(Path("data") / self.options.corpus)
        self.evaluation = Evaluation()
        self._tokens: TokenFolder | None = None
        self._loader: TrainLoader | None = None

    @property
    def folder(self) -> Path:
        """The token folder on this machine."""
        return Path(self.data_dir)

    @property
    def tokens(self) -> TokenFolder:
        """The token folder; prepared first where it does not exist."""
        if self._tokens is None:
            self.prepare_data()
            remote = is_url(self.data_dir)
            self._tokens = (
                open_remote_tokens(self.data_dir, int(self.options.cache_gb * 1e9))
                if remote
                else open_tokens(self.folder)
            )
        return self._tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus."""
        return self.tokens.tokenizer

    def prepare_data(self) -> None:
        """Prepare the corpus where its folder does not exist yet; one process does, the others wait."""
        if is_url(self.data_dir) or self.folder.exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / f".{self.folder.name}.lock"):
            if not self.folder.exists():
                prepare(PrepareOptions(self.options.corpus, output_dir=self.folder))

    @property
    def rows(self) -> int:
        """Rows of a batch that this process has."""
        return rows_of_process(self.trainer, self.options.batch_size)

    @property
    def _text(self) -> str:
        """What the text is known by in a checkpoint."""
        return self.tokens.digest[:16]

    def _sampler(self) -> SegmentSampler:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return SegmentSampler(
            self.tokens.train,
            self.rows,
            self.options.seq_len,
            self.options.seed,
            self.options.segment_len,
            self.options.reset_probability,
            self.options.interleave,
            rank,
            world,
            self._text,
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Return what TensorBoard's table of runs shows of the data."""
        return {
            "corpus": self.tokens.manifest["corpus"]["name"],
            "batch_size": self.options.batch_size,
            "seq_len": self.options.seq_len,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is compared when a run is resumed."""
        return asdict(self.options) | {"text": self._text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say what has changed since the checkpoint; the place in the text is the loader's."""
        if self.trainer is not None and self.trainer.training:
            report_changes("data.", state_dict, self.state_dict())

    def batches_per_epoch(self) -> int:
        """Return the number of training batches of an epoch of the trainer, on each process."""
        batches = len(self._sampler())
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return batches if limit is None else _limited(batches, limit)

    def setup(self, stage: str) -> None:
        """Begin the text anew with each call of the trainer's; UserError where a training would have no batch."""
        if stage == "fit" and self.trainer is not None and self.batches_per_epoch() == 0:
            raise UserError(
                f"trainer.limit_train_batches is {self.trainer.limit_train_batches}, which leaves none of the "
                f"{len(self._sampler())} batches of an epoch; give more"
            )
        self._loader = None

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raise UserError where a batch holds what is no token; a GPU would end with an error of the device."""
        most, known = int(max(batch.inputs.max(), batch.targets.max())), self.tokenizer.vocab_size
        if most >= known:
            raise UserError(
                f"{self.data_dir}: holds token {most:,} where there are {known:,}: it is damaged; mmrec prepare "
                f"--verify says which file, and --force makes it anew"
            )
        return batch

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of this training.

        A second call (``reload_dataloaders_every_n_epochs``) returns the same one, which continues.
        """
        if self._loader is None:
            overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
            self._loader = TrainLoader(self._sampler(), self.batches_per_epoch() if overfit else None)
        return self._loader

    def val_dataloader(self) -> StatefulEvalLoader | WindowedEvalLoader:
        at_once = self.options.batch_size * self.options.seq_len
        if self.evaluation.window is not None:
            return WindowedEvalLoader(
                self.tokens.val, self.evaluation.window, max(1, at_once // self.evaluation.window)
            )
        loader = StatefulEvalLoader(self.tokens.val, at_once)
        if self.trainer is None or self.evaluation.learn:  # learning goes through a text from its begin
            return loader
        limit = self.trainer.limit_test_batches if self.trainer.testing else self.trainer.limit_val_batches
        return StatefulEvalLoader(self.tokens.val, at_once, _limited(len(loader), limit))

    def test_dataloader(self) -> StatefulEvalLoader | WindowedEvalLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulEvalLoader:
        return StatefulEvalLoader(self.tokens.val, self.options.batch_size * self.options.seq_len)


def _limited(batches: int, limit: int | float) -> int:
    """Return how many of so many ``batches`` a limit of Lightning's leaves: a number of them, or a share."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
