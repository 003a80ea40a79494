"""Fit the law of mmrec/planning/law.py to the rows of docs/planning.csv, and say how well it does on texts left out.

python scripts/planning_law.py docs/planning.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from mmrec.planning.law import MOST_APART, Law

ROUNDS = 4000
PULL = 1e-3
"""Weight of what keeps the coefficients near to :data:`START`, since there are few rows."""
START = (0.4, 0.1, 0.35, 0.35, 0.35, 15.0, 0.01, 0.2)
"""Where the fit begins: powers near to those of the literature, the repetition of Muennighoff et al. 2023."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, nargs="?", default=Path("docs/planning.csv"))
    with open(parser.parse_args().table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = sorted({row["text"] for row in rows})
    squares = []
    for left_out in texts:
        law = fit([row for row in rows if row["text"] != left_out])
        misses = [abs(error(law, row)) for row in rows if row["text"] == left_out]
        mean = sum(misses) / len(misses)
        print(f"{left_out:<16} left out of the fit: {len(misses)} rows, off by {mean:.1%} in the mean")
        squares += [miss**2 for miss in misses]
    print(replace(fit(rows), spread=round(math.sqrt(sum(squares) / len(squares)), 4)))


def error(law: Law, row: dict[str, str]) -> float:
    """Return the logarithm of what came over what was expected."""
    relative = law.relative_loss(float(row["parameters"]), float(row["train_tokens"]), float(row["tokens"]))
    return math.log(float(row["bits_per_byte"]) / (law.yardstick(float(row["ngram"]), float(row["xz"])) * relative))


def fit(rows: Sequence[dict[str, str]]) -> Law:
    """Return the law with the least squared error of the logarithms, its coefficients kept positive; its spread is 0.

    What it is off by on texts that it was fitted to says too little of others: the spread is that of texts left out.
    """
    start = torch.tensor(START).log()
    logs = start.clone().requires_grad_()
    columns = {
        name: torch.tensor([float(row[name]) for row in rows])
        for name in ("parameters", "train_tokens", "tokens", "bits_per_byte", "ngram", "xz")
    }
    optimizer = torch.optim.Adam([logs], lr=0.02)
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        misses = _errors(logs.exp(), columns)
        loss = misses.square().mean() + PULL * (logs - start).square().mean()
        loss.backward()
        optimizer.step()
    names = [field.name for field in fields(Law)][: len(START)]
    values = {name: round(value, 4) for name, value in zip(names, logs.exp().tolist(), strict=True)}
    return Law(**values, spread=0.0)


def _errors(values: torch.Tensor, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the errors of all rows, as :meth:`Law.relative_loss` gives them, with gradients."""
    floor, a, a_power, b, b_power, repetition, overfit, copies = values.unbind()
    read, text, parameters = columns["tokens"], columns["train_tokens"], columns["parameters"]
    again = (read / text - 1).clamp(min=0)
    effective = torch.minimum(read, text) + text * repetition * (1 - (-again / repetition).exp())
    crowding = (parameters / text).log1p() * (read / text).clamp(min=1).log()
    relative = floor + a * (parameters / 1e6) ** -a_power + b * (effective / 1e6) ** -b_power + overfit * crowding
    apart = (columns["xz"] / columns["ngram"]).clamp(1 / MOST_APART, MOST_APART)
    return (columns["bits_per_byte"] / (columns["ngram"] * apart**copies * relative)).log()


if __name__ == "__main__":
    main()
