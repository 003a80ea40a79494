"""What every evaluation leaves behind: a table on the terminal, a JSON file and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrec.baselines.tables import print_table
from mmrec.core.files import write_file

__all__ = ["print_table", "save", "save_plot"]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
