"""Fit the law of mmrec/planning/law.py to the rows of docs/planning.csv, and say how well it does on texts left out.

    python scripts/planning_law.py docs/planning.csv

What the law is off by on a text is in part the same for all trainings on it, and that part says nothing of which
training is better: an error is taken as one of the text and one of the row (generalized least squares with a random
effect of each text; Laird and Ware 1982). Rows of one text by several tokenizers are those of one text.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from mmrec.planning.law import MOST_APART, MOST_TOLD_BY_LENGTH, Law

ROUNDS = 200
PULL = 1e-3
"""Weight of what keeps the coefficients near to :data:`START`, since there are few texts of some kinds."""
START = (0.4, 0.1, 0.35, 0.35, 0.35, 15.0, 0.01, 0.2, 0.05, 0.95, 0.03)
"""Where the fit begins: powers near to those of the literature, the repetition of Muennighoff et al. 2023."""
OF_TEXT, OF_ROW = 0.05, 0.02
"""Scales of the errors: of a text, and of the rows of a text around that."""
FREEDOM = 3.0
"""Degrees of freedom of their distribution: the fewer, the more often an error is a large one."""
TWO_OF_THREE = 2 / 3
NAMES = [field.name for field in fields(Law)][: len(START)]
"""Of the coefficients."""
LONG = 200_000
"""Tokens from which on a training is one that a plan of a minute has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, nargs="?", default=Path("docs/planning.csv"))
    with open(parser.parse_args().table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missed, missed_long = [], []
    whole = fit(rows)
    for left_out in sorted({text_of(row) for row in rows}):
        law = fit([row for row in rows if text_of(row) != left_out], whole)
        left = [row for row in rows if text_of(row) == left_out]
        misses = [abs(error(law, row)) for row in left]
        print(
            f"{left_out:<16} left out of the fit: {len(left)} rows, off by {sum(misses) / len(left):.1%} in the mean"
        )
        missed += misses
        missed_long += [miss for miss, row in zip(misses, left, strict=True) if int(row["tokens"]) > LONG]
    within = sum(miss < math.log(1.05) for miss in missed_long)
    print(f"{within} of {len(missed_long)} of more than {LONG:,} tokens within 5 %; {spread(missed_long):.1%}")
    print(replace(whole, spread=round(spread(missed), 4)))


def text_of(row: dict[str, str]) -> str:
    """Return the name of a row's text, without that of a tokenizer after it."""
    return row["text"].partition("-")[0]


def spread(misses: Sequence[float]) -> float:
    """Return what two of three do not exceed."""
    return sorted(misses)[math.ceil(TWO_OF_THREE * len(misses)) - 1]


def error(law: Law, row: dict[str, str]) -> float:
    """Return the logarithm of what came over what was expected."""
    text_tokens = float(row["train_tokens"])
    expected = law.relative_loss(float(row["parameters"]), text_tokens, float(row["tokens"]))
    expected *= law.yardstick(float(row["ngram"]), float(row["xz"]), text_tokens)
    expected *= law.gain_of_counts(text_tokens) ** int(row["counts"])
    return math.log(float(row["bits_per_byte"]) / expected)


def fit(rows: Sequence[dict[str, str]], start: Law | None = None) -> Law:
    """Return the law under which the errors are the likeliest, its coefficients positive; its spread is 0.

    What it is off by on texts that it was fitted to says too little of others: the spread is that of texts left out.

    Args:
        rows: of the table.
        start: where the fit begins; None for :data:`START`.
    """
    prior = torch.tensor(START).log()
    begin = prior if start is None else torch.tensor([getattr(start, name) for name in NAMES]).log()
    logs = begin.clone().requires_grad_()
    columns = {
        name: torch.tensor([float(row[name]) for row in rows])
        for name in ("parameters", "train_tokens", "tokens", "bits_per_byte", "ngram", "xz", "counts")
    }
    texts = [text_of(row) for row in rows]
    members = torch.tensor([[float(text == each) for text in texts] for each in sorted({*texts})])  # [texts, rows]
    counts = members.sum(1)
    optimizer = torch.optim.LBFGS([logs], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        misses = _errors(logs.exp(), columns)
        of_texts = members @ misses / counts
        within = ((misses - of_texts @ members) / OF_ROW).square()
        between = of_texts.square() / (OF_TEXT**2 + OF_ROW**2 / counts)
        unlikely = _unlikely(within).sum() + _unlikely(between).sum()
        found: torch.Tensor = unlikely / len(rows) + PULL / OF_TEXT**2 * (logs - prior).square().mean()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[arg-type]
    values = {name: round(value, 4) for name, value in zip(NAMES, logs.exp().tolist(), strict=True)}
    return Law(**values, spread=0.0)


def _unlikely(squares: torch.Tensor) -> torch.Tensor:
    """Return twice the negative log-likelihood of errors with these squares, in scales, but for a constant."""
    return (FREEDOM + 1) * (squares / FREEDOM).log1p()


def _errors(values: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the errors of all rows, as :meth:`Law.relative_loss` gives them, with gradients."""
    floor, a, a_power, b, b_power, repetition, overfit, copies, length, counting, power = values.unbind()
    read, text, parameters = columns["tokens"], columns["train_tokens"], columns["parameters"]
    again = (read / text - 1).clamp(min=0)
    effective = torch.minimum(read, text) + text * repetition * (1 - (-again / repetition).exp())
    crowding = (parameters / text).log1p() * (read / text).clamp(min=1).log()
    relative = floor + a * (parameters / 1e6) ** -a_power + b * (effective / 1e6) ** -b_power + overfit * crowding
    apart = (columns["xz"] / columns["ngram"]).clamp(1 / MOST_APART, MOST_APART)
    yardstick = columns["ngram"] * apart**copies * (text.clamp(max=MOST_TOLD_BY_LENGTH) / 1e6) ** length
    gain = (counting * (text / 1e6) ** -power) ** columns["counts"]
    return (columns["bits_per_byte"] / (yardstick * relative * gain)).log()


if __name__ == "__main__":
    main()
