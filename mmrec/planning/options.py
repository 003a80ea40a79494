"""The options of ``mmrec train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmrec.core.errors import UserError
from mmrec.training.cli import SECTIONS

HAS = "mmrec train has its text, and its runs in ./lightning_logs"
MAKES = "mmrec train makes a config of its own; give the options themselves, as --model.config.dim 256"
REFUSED = {
    "--data.data_dir": HAS,
    "--data.corpus": HAS,
    "--trainer.default_root_dir": HAS,
    "--trainer.fast_dev_run": "it saves nothing that mmrec train could score",
    "--config": MAKES,
    "-c": MAKES,
    "--trainer.accumulate_grad_batches": "mmrec train plans updates of as many rows as --data.batch_size says",
    "--ckpt_path": "mmrec train goes on from its last checkpoint where it is typed again",
    "--init_from": "the text has to be prepared by the tokenizer of that model before, by mmrec prepare --tokenizer",
}
"""Options of ``mmrec fit`` that are not of ``mmrec train``, and why not: they would train on another text than is
scored, or leave no run to score, or make another training of what the command decides."""
FORWARDED = tuple(f"--{section}." for section in SECTIONS)
"""Beginnings of the options of ``mmrec fit``, which win over the plan's."""

DEFAULT_MINUTES = 10.0
MOST_MINUTES = 60 * 24 * 365


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``mmrec train``.

    Args:
        texts: name of a corpus, or files, folders and URLs of your own text.
        minutes: that it may take, all in all, 10 if left out; where the run has ended already, so many more.
        plan: only say what would be done; the text is prepared for it.
        run: name of the run; that of the text if left out.
        tokenizer: characters, bytes or bpe, or the path of an existing one; chosen by the text if left out.
        encoding: of your own files.
        glob: names of the files that count in a folder, with wildcards; those of text files (.txt, .md, ...) if left
            out.
        on: cpu, gpu, or auto for a GPU where there is one; auto if left out, or what the run was begun on.
    """

    texts: Sequence[str]
    minutes: float | None = None
    plan: bool = False
    run: str | None = None
    tokenizer: str | None = None
    encoding: str = "utf-8"
    glob: str | None = None
    on: Literal["auto", "cpu", "gpu"] | None = None

    def __post_init__(self) -> None:
        if self.run == "":
            raise UserError("--run is ''; it must be a name, or be left out")
        if self.minutes is not None and not 0.1 <= self.minutes <= MOST_MINUTES:
            raise UserError(
                f"--minutes is {self.minutes:g}; it must be at least 0.1, and at most {MOST_MINUTES:,}, a year"
            )

    @property
    def minutes_or_default(self) -> float:
        """The minutes of a training that is not one that was stopped."""
        return DEFAULT_MINUTES if self.minutes is None else self.minutes


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that are the command's own, and those that are passed on to ``mmrec fit``.

    Raises:
        UserError: one is passed on that the command itself decides.
    """
    own: list[str] = []
    forwarded: list[str] = []
    awaits_value = False
    for arg in args:
        if awaits_value:
            forwarded.append(arg)
            awaits_value = False
        elif (name := arg.partition("=")[0]) in REFUSED:
            raise UserError(f"{name} is for mmrec fit; {REFUSED[name]}")
        elif arg.startswith(FORWARDED) or name == "--seed_everything":
            forwarded.append(arg)
            awaits_value = "=" not in arg
        else:
            own.append(arg)
    return own, forwarded


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of the option ``name``, the last where it is given twice; None where it is not there."""
    value = None
    for place, arg in enumerate(arguments):
        if arg == name and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
    return value


def in_place(options: Sequence[str], changed: Sequence[str]) -> list[str]:
    """Return ``options``, each with its value, with ``changed`` in the place of those of the same names."""
    names = tuple(f"{option.partition('=')[0]}=" for option in changed)
    return [*(option for option in options if not option.startswith(names)), *changed]
