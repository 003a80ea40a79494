"""Tables of a comparison: medians, spreads and ratios, and what is read off learning curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mmrec.baselines.tables import print_table

OURS = "mmrec"
"""The model that the others are compared with."""
NANOGPT_LOSS = 1.8857
"""Validation loss, in nats/char, that nanoGPT's CPU preset ends with on Tiny Shakespeare."""


def ratios(ours: Sequence[Any], theirs: Sequence[Any], key: str) -> list[float]:
    """Return ours over theirs, round by round, where both were measured."""
    return [a[key] / b[key] for a, b in zip(ours, theirs, strict=True) if key in a and key in b]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Return ``median (min to max)``."""
    if not values:
        return "-"
    return " ".join(
        [form.format(statistics.median(values)), f"({form.format(min(values))} to {form.format(max(values))})"]
    )


def show_speed(
    title: str, label: str, points: Sequence[int], found: Sequence[dict[str, list[Any]]], key: str, unit: float = 1
) -> None:
    """Print a table: at each point the median of each model, and the ratio of ours to it."""
    rows = []
    for point, results in zip(points, found, strict=True):
        cells = [f"{point:,}"]
        for name, values in results.items():
            median = [value[key] / unit for value in values if key in value]
            cells.append(f"{statistics.median(median):,.0f}" if median else "failed")
            if name != OURS:
                cells.append(spread(ratios(results[OURS], values, key)))
        rows.append(cells)
    names = list(found[0])
    print_table(title, [label, names[0], *(part for name in names[1:] for part in (name, f"{OURS} / {name}"))], rows)


def show_reading(found: dict[str, list[Any]], total: int) -> None:
    """Print how time and memory change from the first eighth of what was read to the last."""
    runs = [run for run in found[OURS] if "failed" not in run]
    time = [run["seconds_per_token"][-1] / run["seconds_per_token"][0] for run in runs]
    memory = [run["peak_bytes"][-1] / run["peak_bytes"][0] for run in runs]
    rows = [["time per token", spread(time, "{:.3f}")], ["peak memory", spread(memory, "{:.3f}")]]
    print_table(f"reading {total:,} tokens, the last eighth over the first", ["", "median (min to max)"], rows)


def show_learning(found: dict[str, list[Any]]) -> None:
    """Print the loss after all tokens, after equal seconds, and the seconds to nanoGPT's loss."""
    rows = []
    for name, runs in found.items():
        runs = [run for run in runs if "curve" in run]
        pairs = [(run, ours) for run, ours in zip(runs, found[OURS], strict=False) if "curve" in ours]
        equal = [at_time(run["curve"], min(end(run), end(ours))) for run, ours in pairs]
        rows.append(
            [
                name,
                runs[0]["protocol"] if runs else "failed",
                spread([run["curve"][-1]["loss"] for run in runs], "{:.4f}"),
                spread([value for value in equal if value is not None], "{:.4f}"),
                spread([value for run in runs if (value := time_to(run["curve"], NANOGPT_LOSS))], "{:.1f}"),
                spread([end(run) for run in runs], "{:.0f}"),
            ]
        )
    head = ["", "protocol", "loss at equal tokens", "loss at equal seconds", f"seconds to {NANOGPT_LOSS}", "seconds"]
    print_table("learning, median (min to max) over seeds, nats/token", head, rows)


def show_time_to_target(found: dict[str, list[Any]]) -> None:
    """Print the seconds to nanoGPT's loss, and the ratio of ours to each other model's."""
    times = {name: [time_to(run.get("curve", []), NANOGPT_LOSS) for run in runs] for name, runs in found.items()}
    rows = []
    for name, seconds in times.items():
        shares = [mine / other for mine, other in zip(times[OURS], seconds, strict=True) if mine and other]
        rows.append([name, spread([value for value in seconds if value], "{:.1f}"), spread(shares)])
    print_table(
        f"time to target: seconds of training to {NANOGPT_LOSS}, median (min to max)",
        ["", "seconds", "ours / theirs"],
        rows,
    )


def end(run: dict[str, Any]) -> float:
    """Return the seconds of training of a whole learning curve."""
    return float(run["curve"][-1]["seconds"])


def at_time(curve: Sequence[dict[str, float]], seconds: float) -> float | None:
    """Return the loss that was reached by ``seconds``, or None before the first score."""
    reached = [point["loss"] for point in curve if point["seconds"] <= seconds]
    return reached[-1] if reached else None


def time_to(curve: Sequence[dict[str, float]], loss: float) -> float | None:
    """Return the seconds after which the loss was reached, on a straight line between two scores, or None."""
    before: dict[str, float] | None = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return point["seconds"]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None
