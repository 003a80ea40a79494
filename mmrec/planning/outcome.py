"""What is said at the end of ``mmrec train``: the score, beside compressors, a sample, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.runs import BEST, LAST, LOGS, checkpoint_folder, run_option
from mmrec.core.threads import use_threads
from mmrec.data.store import TokenFolder
from mmrec.inference.api import MemoryLM
from mmrec.inference.generate import default_prompt
from mmrec.inference.reading import READ_CHUNK
from mmrec.planning.comparison import MOST_SCORED, Comparison, bits_per_byte, carried_nll, compare
from mmrec.planning.record import Record, seconds_trained

SAMPLE = 300
"""Tokens of the sample."""


def best_checkpoint(root: Path, run: str) -> Path:
    """Return the best checkpoint of a run, or the last one where no validation was reached."""
    folder = checkpoint_folder(root, run)
    best = folder / f"{BEST}.ckpt"
    return best if best.exists() else folder / f"{LAST}.ckpt"


def sample(trained: LoadedModel) -> str:
    """Return a text that the model writes."""
    return MemoryLM(trained).generate(default_prompt(trained.tokenizer), SAMPLE).strip()


def report(run: str, folder: TokenFolder, record: Record, seconds: float) -> tuple[float, str]:
    """Return the bits per byte of the best checkpoint of a run in the current folder, and what is said at its end.

    Args:
        run: its name.
        folder: has the validation text.
        record: of the run.
        seconds: that the comparison with PPMd, and with a memory that learns, may take.
    """
    checkpoint = best_checkpoint(Path(), run)
    trained = load_model(checkpoint)
    use_threads(trained.net.config.dim, READ_CHUNK)
    nll = carried_nll(trained, folder)
    score, beside = bits_per_byte(nll, folder), compare(trained, folder, nll, seconds)
    option, path = run_option(run), f"{LOGS}/{run}"
    part = "" if len(folder.val) <= MOST_SCORED else f" of its first {MOST_SCORED:,} tokens"
    return score, "\n".join(
        [
            f"validation  {score:.3f} bits/byte{part}, with the state carried; {_expected(record)}",
            *([] if beside is None else _with_memory(beside, len(nll))),
            f"beside it   {record.xz:.3f} bits/byte by xz{_ppmd(beside, len(nll))}, after the training text",
            f"model       {checkpoint}, {trained.step:,} updates{_longer(record, checkpoint)}",
            "",
            "It writes:",
            "",
            sample(trained),
            "",
            "What can be typed next:",
            f"  mmrec generate {option} --length 1000",
            f"  mmrec read BOOK.txt {option} --learn --save book.mem",
            f"  mmrec serve {option}",
            f"  mmrec report {shlex.quote(path if run.startswith('-') else run)}",
            "and the same line again, which trains for longer; a saved memory stays with the model that read it.",
        ]
    )


def _expected(record: Record) -> str:
    """Return what was expected, at first and half-way."""
    first, now = ("", "") if record.expected_is_own else (" of a training of another length", " of this one")
    told = f"{record.expected:.3f} were expected{first}"
    if record.half_way is None:
        return told
    return f"{told}{'' if first else ' at first'}, {record.half_way:.3f} half-way{now}"


def _longer(record: Record, best: Path) -> str:
    """Return what is said where a longer training has not come to a better checkpoint."""
    is_old = record.reached is not None and seconds_trained(best) == record.reached
    return "; it was the best before, too: training for longer has not made a better one" if is_old else ""


def _with_memory(beside: Comparison, scored: int) -> list[str]:
    """Return the lines about the memory: where it read a part of the text alone, with the others' figures for it."""
    how = "learning and counting n-grams" if beside.counts else "learning"
    part = f" on the first {beside.tokens:,} tokens" if beside.tokens < scored else ""
    lines = [f"memory      {beside.memory:.3f} bits/byte{part}, {how} as it reads"]
    if part:
        ppmd = "" if beside.ppmd is None else f", and {beside.ppmd:.3f} by PPMd"
        lines[0] += ";"
        lines.append(f"            on these tokens it has {beside.state:.3f} without{ppmd}")
    return lines


def _ppmd(beside: Comparison | None, scored: int) -> str:
    """Return PPMd's figure, where it is one for the whole of what was scored."""
    known = beside is not None and beside.ppmd is not None and beside.tokens == scored
    return f", {beside.ppmd:.3f} by PPMd" if known and beside is not None else ""
