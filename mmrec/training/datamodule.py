"""The LightningDataModule: prepares a corpus when it is not there yet, and serves its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import LightningDataModule

from mmrec.core.errors import UserError
from mmrec.core.urls import is_url
from mmrec.data.batches import SegmentSampler, StatefulEvalLoader, TrainLoader, WindowedEvalLoader
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare
from mmrec.data.remote_store import open_remote_tokens
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.tokenizers import Tokenizer
from mmrec.training.dynamic import DYNAMIC_LENGTH


@dataclass(frozen=True)
class Evaluation:
    """How a text is scored; by default in one pass with the memory carried.

    Args:
        window: in windows of so many tokens, each from an empty memory.
        dynamic: learning from every part once it is scored.
    """

    window: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"--window is {self.window}; it must be at least 1")
        if self.window is not None and self.dynamic:
            raise UserError("give --window or --dynamic, not both: a dynamic evaluation carries its memory")

    def __str__(self) -> str:
        if self.window is not None:
            return f"windowed at {self.window}"
        return "dynamic" if self.dynamic else "carried"


class TextDataModule(LightningDataModule):
    """Token streams of one corpus.

    Args:
        corpus: corpus to read where no data_dir is given, from data/CORPUS, prepared first where that is not
            there yet: tiny_shakespeare, shakespeare_plays or sample.
        data_dir: token folder of your own text, as ``mmrec prepare`` writes it; or its URL, as s3://bucket/folder.
        batch_size: rows that are read side by side, per process.
        seq_len: tokens that a row reads in one batch; the gradient reaches back so far, the memory further.
        segment_len: tokens that a row reads on before it goes on elsewhere in the text.
        reset_probability: chance that a row starts such a segment with an empty memory.
        interleave: number of interleaved streams: each has batch_size rows of its own with their carried states, and
            consecutive updates read from different streams.
        seed: of the order in which the text is read.
        cache_gb: most gigabytes of a remote token folder that each process keeps on its machine.
    """

    def __init__(
        self,
        corpus: str = "tiny_shakespeare",
        data_dir: str | None = None,
        batch_size: int = 4,
        seq_len: int = 512,
        segment_len: int = 2048,
        reset_probability: float = 0.5,
        interleave: int = 1,
        seed: int = 0,
        cache_gb: float = 1.0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "seq_len": seq_len, "segment_len": segment_len, "interleave": interleave}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"data.{name} is {value}; it must be at least 1")
        if not 0 <= reset_probability <= 1:
            raise UserError(f"data.reset_probability is {reset_probability}; it must lie in 0..1")
        if seed < 0:
            raise UserError(f"data.seed is {seed}; it must be at least 0")
        self.corpus = corpus
        if not cache_gb > 0:
            raise UserError(f"data.cache_gb is {cache_gb}; it must be more than 0")
        if data_dir is not None and not is_url(data_dir) and not Path(data_dir).exists():
            raise UserError(
                f"{data_dir}: no such folder; mmrec prepare --output_dir {data_dir} makes it from your text"
            )
        self.data_dir = data_dir or str(Path("data") / corpus)
        self.cache_gb = cache_gb
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.segment_len = segment_len
        self.reset_probability = reset_probability
        self.interleave = interleave
        self.seed = seed
        self.evaluation = Evaluation()
        self._tokens: TokenFolder | None = None
        self._rows: TrainLoader | None = None

    @property
    def folder(self) -> Path:
        """The token folder on this machine."""
        return Path(self.data_dir)

    @property
    def tokens(self) -> TokenFolder:
        """The token folder; prepared first where it is not there."""
        if self._tokens is None:
            self.prepare_data()
            remote = is_url(self.data_dir)
            self._tokens = (
                open_remote_tokens(self.data_dir, int(self.cache_gb * 1e9)) if remote else open_tokens(self.folder)
            )
        return self._tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus."""
        return self.tokens.tokenizer

    def prepare_data(self) -> None:
        """Prepare the corpus where its folder is not there yet; one process does, the others wait."""
        if is_url(self.data_dir) or self.folder.exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.parent / f".{self.folder.name}.lock"):
            if not self.folder.exists():
                prepare(PrepareOptions(self.corpus, output_dir=self.folder))

    def _stream(self) -> SegmentSampler:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return SegmentSampler(
            self.tokens.train,
            self.batch_size,
            self.seq_len,
            self.seed,
            self.segment_len,
            self.reset_probability,
            self.interleave,
            rank,
            world,
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Return what TensorBoard's table of runs shows of the data."""
        return {
            "corpus": self.tokens.manifest["corpus"]["name"],
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
        }

    def batches_per_epoch(self) -> int:
        """Return the number of training batches of an epoch of the trainer, on each process."""
        batches = len(self._stream())
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        if limit is None:
            return batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def setup(self, stage: str) -> None:
        """Begin the text anew with each call of the trainer's."""
        self._rows = None

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of this training: asked again (``reload_dataloaders_every_n_epochs``) it goes on."""
        if self._rows is None:
            overfit = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
            self._rows = TrainLoader(self._stream(), self.batches_per_epoch() if overfit else None)
        return self._rows

    def val_dataloader(self) -> StatefulEvalLoader | WindowedEvalLoader:
        at_once = self.batch_size * self.seq_len
        if self.evaluation.window is not None:
            return WindowedEvalLoader(
                self.tokens.val, self.evaluation.window, max(1, at_once // self.evaluation.window)
            )
        return StatefulEvalLoader(self.tokens.val, DYNAMIC_LENGTH if self.evaluation.dynamic else at_once)

    def test_dataloader(self) -> StatefulEvalLoader | WindowedEvalLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulEvalLoader:
        return StatefulEvalLoader(self.tokens.val, self.batch_size * self.seq_len)
