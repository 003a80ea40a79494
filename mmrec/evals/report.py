"""What every evaluation leaves behind: a table on the terminal, a JSON file and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrec.baselines.tables import print_table
from mmrec.core.files import refuse_to_replace, refuse_to_replace_picture, staged_file, write_file

__all__ = ["print_table", "refuse_to_replace_results", "save", "save_plot"]


def refuse_to_replace_results(folder: Path, name: str, begins: bytes) -> None:
    """Raise UserError where NAME.json or NAME.png in ``folder`` is something else than a result of an evaluation.

    Args:
        folder: that --output_dir names.
        name: of the evaluation.
        begins: the first bytes of its JSON.
    """
    refuse_to_replace(folder / f"{name}.json", begins, "results of this evaluation", "--output_dir")
    refuse_to_replace_picture(folder / f"{name}.png", "--output_dir")


def save(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` as JSON, whole or not at all."""
    write_file(path, json.dumps(results, indent=1) + "\n", parents=True)
    print(f"\nwritten to {path}")


def save_plot(path: Path, draw: Callable[[Any], None]) -> None:
    """Write the picture that ``draw`` makes on the axes it is given; say what is missing where matplotlib is."""
    try:
        import matplotlib
    except ImportError:
        print("for a picture: pip install 'mmrec[plot]'")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")  # beside the lines: up to nine models, some of which coincide
    with staged_file(path, parents=True) as file:
        figure.savefig(file, dpi=100, format="png")
    pyplot.close(figure)
