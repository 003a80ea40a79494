"""One picture of a comparison: speed by length and position, and loss by time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.core.files import staged_file


def plot(results: dict[str, Any], path: Path) -> bool:
    """Write the panels of what was measured to ``path``; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("train", "decode", "learn") if kind in results]
    if not kinds:
        return True
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        if kind == "learn":
            _curves(axis, results[kind])
        else:
            title, label = ("training", "tokens of a row") if kind == "train" else ("decoding", "tokens read before")
            _speeds(axis, results[kind], results["points"][kind])
            axis.set(title=title, xlabel=label, ylabel="tokens/s", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    with staged_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return True


def _speeds(axis: Any, found: Sequence[dict[str, list[Any]]], points: Sequence[int]) -> None:
    for name in found[0]:
        values = [[run["tokens_per_second"] for run in at[name] if "tokens_per_second" in run] for at in found]
        known = [(point, statistics.median(runs)) for point, runs in zip(points, values, strict=True) if runs]
        axis.plot(*zip(*known, strict=True) if known else ([], []), marker="o", label=name)


def _curves(axis: Any, found: dict[str, list[Any]]) -> None:
    for index, (name, runs) in enumerate(found.items()):
        for number, run in enumerate(runs):
            curve = run.get("curve", [])
            seconds, losses = [point["seconds"] for point in curve], [point["loss"] for point in curve]
            axis.plot(seconds, losses, color=f"C{index}", label=None if number else name)
    axis.set(title="learning", xlabel="seconds of training", ylabel="validation loss, nats/token")
