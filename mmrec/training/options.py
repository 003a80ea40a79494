"""Options of training, ``--model.*`` and ``--data.*``: dataclasses that validate themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmrec.core.errors import UserError
from mmrec.core.urls import is_url


def check_range(name: str, value: float, low: float, high: float = math.inf, closed: bool = False) -> None:
    """Raise UserError where ``value`` is not in [low, high), or in [low, high] if ``closed``; NaN never is."""
    if low <= value < high or (closed and value == high):
        return
    upper = "" if high == math.inf else f" and at most {high:g}" if closed else f" and below {high:g}"
    raise UserError(f"{name} is {value}; it must be at least {low:g}{upper}")


def check_seed(seed: int) -> None:
    """Raise UserError where ``seed`` is none of NumPy's generator, which is seeded with torch's."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed_everything is {seed}; it must be from 0 to {2**32 - 1}")


def report_changes(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say which options of a resumed run are others than in its checkpoint.

    Args:
        prefix: of the names, such as "data.".
        before: the options in the checkpoint; an older one does not know all names.
        now: the options that are in force.
    """
    changed = [f"{prefix}{name} {before[name]} -> {new}" for name, new in now.items() if new != before.get(name, new)]
    if changed:
        rank_zero_info(f"Changed since the checkpoint, and in force from here on: {', '.join(changed)}")


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning-rate schedule.

    Args:
        optimizer: "muon" (with AdamW for all that is not a layer's matrix) or "adamw".
        learning_rate: peak learning rate, reached at the end of the warm-up.
        weight_decay: of matrices and embeddings, relative to the learning rate.
        beta1: AdamW's decay of the average of gradients.
        beta2: AdamW's decay of the average of squared gradients.
        warmup_steps: updates over which the learning rate rises linearly.
        schedule: "cosine", or "wsd" (warm-up, stable, decay): at the peak until the last updates, then down.
        decay_ratio: share of the updates over which "wsd" lowers the learning rate.
        min_lr_ratio: learning rate at the end of the schedule, as a share of the peak; a run without a number of
            steps or epochs, or a limit of time, stays at the peak.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_ratio: float = 0.25
    min_lr_ratio: float = 0.05

    def __post_init__(self) -> None:
        check_range("model.learning_rate", self.learning_rate, 0)
        check_range("model.weight_decay", self.weight_decay, 0)
        check_range("model.beta1", self.beta1, 0, 1)
        check_range("model.beta2", self.beta2, 0, 1)
        check_range("model.warmup_steps", self.warmup_steps, 0)
        check_range("model.decay_ratio", self.decay_ratio, 0, 1, closed=True)
        check_range("model.min_lr_ratio", self.min_lr_ratio, 0, 1, closed=True)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return self.beta1, self.beta2


@dataclass(frozen=True)
class TrainingOptions(OptimizerOptions):
    """What training minimizes, and how.

    Args:
        optimizer: "muon" (with AdamW for all that is not a layer's matrix) or "adamw".
        learning_rate: peak learning rate, reached at the end of the warm-up.
        weight_decay: of matrices and embeddings, relative to the learning rate.
        beta1: AdamW's decay of the average of gradients.
        beta2: AdamW's decay of the average of squared gradients.
        warmup_steps: updates over which the learning rate rises linearly.
        schedule: "cosine", or "wsd" (warm-up, stable, decay): at the peak until the last updates, then down.
        decay_ratio: share of the updates over which "wsd" lowers the learning rate.
        min_lr_ratio: learning rate at the end of the schedule, as a share of the peak; a run without a number of
            steps or epochs, or a limit of time, stays at the peak.
        dropout: dropout rate of activations.
        mtp_loss_weight: weight of the multi-token-prediction loss, on the token after the next, relative to the next
            token's; it falls to 0 at the end of a run with a number of steps or epochs. 0 leaves it out.
        confidence_penalty: weight of the predictions' entropy, which is subtracted from the loss: it regularizes the
            memorization of a small text; it rises from 0 to the end of a run with a number of steps or epochs. 0
            leaves it out.
        reset_at_documents: reset the state at the start of each document, where the text is cut into documents; else
            it is carried on from one to the next.
        activation_checkpointing: keep what goes into each block alone, and compute the block once more for the
            gradients: a third more work, and a fraction of the memory. The bits are the same.
        compile: compile the model as one graph by torch.compile, in the place of the kernels that it has for the
            device: meant for a GPU, where the first update then takes minutes; on a CPU all take longer.
    """

    dropout: float = 0.0
    mtp_loss_weight: float = 0.0
    confidence_penalty: float = 0.0
    reset_at_documents: bool = False
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.dropout", self.dropout, 0, 1)
        check_range("model.mtp_loss_weight", self.mtp_loss_weight, 0)
        check_range("model.confidence_penalty", self.confidence_penalty, 0, 1)


@dataclass(frozen=True)
class DataOptions:
    """Which text is read, and in which batches.

    Args:
        corpus: corpus to read where no data_dir is given, from data/CORPUS, prepared first where that does not exist
            yet: tiny_shakespeare, shakespeare_plays or sample.
        data_dir: token folder of your own text, as ``mmrec prepare`` writes it; or its URL, as s3://bucket/folder.
        batch_size: sequences of a batch, per process; of all processes together with the strategy cores.
        seq_len: tokens of each sequence in one batch: the length of truncated back-propagation through time; the
            state is carried further.
        segment_len: tokens that a row of the batch reads in order before it goes to another place of the text.
        reset_probability: probability that a row starts such a segment from the zero state.
        interleave: number of interleaved streams: each has batch_size rows of its own with their carried states, and
            consecutive updates read from different streams.
        seed: of the order in which the text is read.
        cache_gb: most gigabytes of a remote token folder that each process caches on its machine.
    """

    corpus: str = "tiny_shakespeare"
    data_dir: str | None = None
    batch_size: int = 4
    seq_len: int = 512
    segment_len: int = 2048
    reset_probability: float = 0.5
    interleave: int = 1
    seed: int = 0
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "segment_len", "interleave"):
            check_range(f"data.{name}", getattr(self, name), 1)
        check_range("data.reset_probability", self.reset_probability, 0, 1, closed=True)
        check_range("data.seed", self.seed, 0)
        if not self.cache_gb > 0:
            raise UserError(f"data.cache_gb is {self.cache_gb}; it must be more than 0")
        folder = self.data_dir
        if folder is not None and not is_url(folder) and not Path(folder).exists():
            raise UserError(
                f"{folder}: no such folder; make it from your text by mmrec prepare --output_dir {folder}"
            )
