"""Train models of several sizes on several texts, as mmrec train would, and add a row for each to a table.

The law that plans are made by (mmrec/planning/law.py) is fitted to that table: see scripts/planning_law.py.

    python scripts/planning_study.py data/plays data/manual --shapes "64 x 3" "128 x 4" --tokens 500000 1500000

Rows that the table holds already are not trained again.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmrec.checkpoints.loading import load_model
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.comparison import bits_per_byte as scored_bits_per_byte
from mmrec.planning.comparison import carried_nll
from mmrec.planning.plan import SHAPES, Text, TrainingPlan, choose_batches, fit_options, shapes_for
from mmrec.planning.text import describe_text
from mmrec.training.callbacks.run_log import commit, environment

COLUMNS = (
    "text",
    "sha256",
    "train_tokens",
    "val_tokens",
    "vocab_size",
    "counts",
    "xz",
    "ngram",
    "shape",
    "parameters",
    "tokens",
    "epochs",
    "seed",
    "bits_per_byte",
    "commit",
    "processor",
)


def main() -> None:
    parser = table_parser(__doc__, "docs/planning.csv")
    shapes = [shape_name(config) for config in SHAPES]
    parser.add_argument("--shapes", nargs="+", default=shapes[:3], choices=shapes, help="width and layers of models")
    parser.add_argument("--tokens", nargs="+", type=int, default=[500_000, 1_500_000], help="tokens to read")
    options = parser.parse_args()
    for tokens in options.tokens:
        for shape in options.shapes:
            for folder in options.data_dirs:
                for seed in options.seeds:
                    add_row(options.table, folder, shape, tokens, seed)


def table_parser(doc: str | None, table: str, folders: str = "+") -> argparse.ArgumentParser:
    """Return a parser of what every study has: texts, seeds, and the table that rows are added to.

    Args:
        doc: of the script; its first line says what it does.
        table: path of the table where none is given.
        folders: how many there are: "+", or "*" where a script without any reports on its table alone.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("data_dirs", nargs=folders, type=Path, help="token folders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", type=Path, default=Path(table))
    return parser


def shape_name(config: ModelConfig) -> str:
    """Return what a table calls a model: its width and its layers."""
    return f"{config.dim} x {config.layers}"


def shapes_by_name(text: Text) -> dict[str, ModelConfig]:
    """Return the models that a plan for ``text`` chooses from, the smallest first, by their names in a table."""
    return {shape_name(config): config for config in shapes_for(text)}


def add_row(table: Path, folder: Path, shape: str, tokens: int, seed: int) -> None:
    """Train, and append what came of it to ``table``."""
    opened = open_tokens(folder)
    key = {"sha256": digest(opened), "shape": shape, "tokens": str(tokens), "seed": str(seed)}
    if is_there(table, key):
        return
    text = describe_text(opened)
    config = shapes_by_name(text)[shape]
    batches = choose_batches(config, text.train_tokens, tokens)
    plan = TrainingPlan(config, batches, max(1, tokens // batches.tokens), text, 0.0, 0.0)
    sizes = {
        "val_tokens": text.val_tokens,
        "vocab_size": text.vocab_size,
        "counts": int(bool(config.count_half_lives)),
    }
    append(table, COLUMNS, key | sizes | row_of(folder, plan, bits_per_byte(folder, plan, seed)))


def digest(tokens: TokenFolder) -> str:
    """Return what names a training text in a table: the begin of its sha256."""
    return str(tokens.manifest["files"]["train.bin"]["sha256"])[:16]


def text_digest(tokens: TokenFolder) -> str:
    """Return what names a text in a table, by whatever tokenizer it was prepared: the begin of its sha256."""
    return str(tokens.manifest["corpus"]["sha256"])[:16]


def is_there(table: Path, key: dict[str, str]) -> bool:
    """Whether ``table`` has a row with these values."""
    return any(all(row[name] == value for name, value in key.items()) for row in rows(table))


def row_of(folder: Path, plan: TrainingPlan, reached: float) -> dict[str, object]:
    """Return what a table says of a training by ``plan``, which ``reached`` so many bits per byte."""
    return {
        "text": folder.name,
        "train_tokens": plan.text.train_tokens,
        "xz": round(plan.text.xz, 4),
        "ngram": round(plan.text.ngram, 4),
        "parameters": layer_parameters(plan.config),
        "epochs": round(plan.epochs, 3),
        "bits_per_byte": round(reached, 4),
        "commit": commit(),
        "processor": environment()["processor"],
    }


def append(table: Path, columns: Sequence[str], row: dict[str, object]) -> None:
    """Append a row to ``table``, which begins with the names of its columns."""
    is_new = not table.exists()
    with open(table, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def rows(table: Path) -> list[dict[str, str]]:
    """Return the rows of ``table``; none where it is not there yet."""
    if not table.exists():
        return []
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bits_per_byte(
    folder: Path, plan: TrainingPlan, seed: int, options: Sequence[str] = (), curve: Path | None = None
) -> float:
    """Return the bits per byte of the best checkpoint of a training by ``plan``, on the whole validation text.

    Args:
        folder: has the text.
        plan: what is trained.
        seed: of the weights and of the order.
        options: of ``mmrec fit``, which win over the plan's.
        curve: file for the losses on the way, as Lightning's CSVLogger writes them; None for none.
    """
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "mmrec", "fit", "--run=study", f"--data.data_dir={folder.absolute()}"]
        command += [
            *fit_options(plan),
            *options,
            f"--trainer.max_steps={plan.steps}",
            "--trainer.devices=1",
            f"--seed_everything={seed}",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={root}",
        ]
        if curve is None:
            command.append("--trainer.logger=false")
        else:
            command += ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={root}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if curve is not None:
            shutil.copy(next(Path(root).rglob("metrics.csv")), curve)
        opened = open_tokens(folder)
        best = load_model(Path(root, "lightning_logs", "study", "checkpoints", "best.ckpt"))
        return scored_bits_per_byte(carried_nll(best, opened), opened)


if __name__ == "__main__":
    main()
