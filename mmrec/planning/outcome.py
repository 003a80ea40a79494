"""What is said at the end of ``mmrec train``: the score, beside compressors, a sample, and what to type next."""

from __future__ import annotations

from pathlib import Path

import torch

from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.runs import BEST, LAST, checkpoint_folder
from mmrec.checkpoints.state_file import SavedState
from mmrec.data.store import TokenFolder
from mmrec.inference.api import MemoryLM
from mmrec.inference.generate import default_prompt
from mmrec.inference.metrics import TextMetrics
from mmrec.inference.reading import Reader
from mmrec.planning.record import Record
from mmrec.tokenizers import token_lengths

MOST_SCORED = 2_000_000
"""Tokens of the validation text that are scored at the end."""
SAMPLE = 300
"""Tokens of the sample."""


def best_checkpoint(root: Path, run: str) -> Path:
    """Return the best checkpoint of a run, or the last one where no validation was reached."""
    folder = checkpoint_folder(root, run)
    best = folder / f"{BEST}.ckpt"
    return best if best.exists() else folder / f"{LAST}.ckpt"


def bits_per_byte(trained: LoadedModel, folder: TokenFolder) -> float:
    """Return the bits per byte of a model on the validation text, its first :data:`MOST_SCORED` tokens."""
    metrics, lengths = TextMetrics(), torch.from_numpy(token_lengths(trained.tokenizer))
    for part in Reader(trained.net, SavedState.empty(trained.net)).read(folder.val[:MOST_SCORED]):
        metrics.update(part.nll[part.scored], lengths[part.tokens[part.scored]])
    return float(metrics.compute()["bits_per_byte"])


def sample(trained: LoadedModel) -> str:
    """Return a text that the model writes."""
    return MemoryLM(trained).generate(default_prompt(trained.tokenizer), SAMPLE).strip()


def report(run: str, folder: TokenFolder, record: Record) -> str:
    """Return what is said at the end of a run in the current folder."""
    checkpoint = best_checkpoint(Path(), run)
    trained = load_model(checkpoint)
    score = bits_per_byte(trained, folder)
    part = "" if len(folder.val) <= MOST_SCORED else f" of its first {MOST_SCORED:,} tokens"
    return "\n".join(
        [
            f"validation  {score:.3f} bits/byte{part}, with the state carried; {record.expected:.3f} were expected",
            f"beside it   {record.xz:.3f} bits/byte by xz, which has the training text before it",
            f"model       {checkpoint}, {trained.step:,} updates",
            "",
            "It writes:",
            "",
            sample(trained),
            "",
            "What can be typed next:",
            f"  mmrec generate --run {run} --length 1000",
            f"  mmrec read BOOK.txt --run {run} --learn --save book.mem",
            f"  mmrec serve --run {run}",
            f"  mmrec report {run}",
            "and the same line again, which trains for longer.",
        ]
    )
