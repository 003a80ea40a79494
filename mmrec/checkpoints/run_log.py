"""Reading the folder of a run: its TensorBoard events, config, history and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrec.checkpoints.runs import BEST, CHECKPOINTS, CONFIG, HISTORY, LAST, PREVIOUS, read_config

Curve = dict[int, float]
"""Values by the number of updates after which they were taken, in order."""
Histogram = list[tuple[float, float, float]]
"""Lower edge, upper edge and count of each bucket."""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint: its name, its bytes and when it was written."""

    name: str
    size: int
    time: datetime


@dataclass(frozen=True)
class Run:
    """A run, as far as it has come.

    Attributes:
        name: of its folder.
        config: everything that was set.
        config_text: the same as it was written.
        curves: what was logged and is finite, by tag.
        histograms: by tag, the last of each.
        samples: texts by the number of updates.
        history: its starts and ends, in order; empty in runs of older versions.
        checkpoints: those that are there.
        last_logged: when anything was last logged.
    """

    name: str
    config: dict[str, Any]
    config_text: str
    curves: dict[str, Curve]
    histograms: dict[str, Histogram]
    samples: dict[int, str]
    history: list[dict[str, Any]]
    checkpoints: list[CheckpointFile]
    last_logged: datetime | None

    def curve(self, tag: str) -> Curve:
        """Return what was logged under ``tag``, maybe nothing."""
        return self.curves.get(tag, {})

    def group(self, prefix: str) -> dict[str, Curve]:
        """Return the curves whose tag is ``prefix/NAME``, by NAME."""
        return {tag.removeprefix(f"{prefix}/"): c for tag, c in self.curves.items() if tag.startswith(f"{prefix}/")}

    @property
    def updates(self) -> int:
        """How many updates are known to have been made."""
        said = [int(line["step"]) for line in self.history]
        return max([0, *said, *(step for tag in ("train/loss", "val/loss") for step in self.curve(tag))])

    @property
    def best(self) -> tuple[int, float] | None:
        """Updates and loss of the validation with the lowest loss; None before the first validation."""
        losses = self.curve("val/loss")
        return min(losses.items(), key=lambda item: item[1]) if losses else None

    @property
    def ended(self) -> str | None:
        """How the last start ended; None where no end was noted."""
        last = self.history[-1] if self.history else {}
        return str(last["how"]) if last.get("event") == "end" else None


def read_run(folder: Path) -> Run:
    """Read what is in the folder of a run; what is not there yet is empty.

    Raises:
        UserError: the config is not readable.
    """
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    times = [board.Scalars(tag)[-1].wall_time for tag in tags["scalars"]]
    config, text = read_config(folder / CONFIG)
    sample = "sample/text_summary"
    texts = _by_updates(board.Tensors, sample) if sample in tags["tensors"] else {}
    return Run(
        name=folder.resolve().name,
        config=config,
        config_text=text,
        curves={tag: _curve(_by_updates(board.Scalars, tag)) for tag in tags["scalars"]},
        histograms={tag: _buckets(board.Histograms(tag)[-1].histogram_value) for tag in tags["histograms"]},
        samples={updates: _sample(event) for updates, event in texts.items()},
        history=_history(folder / HISTORY),
        checkpoints=[file for n in (BEST, LAST, PREVIOUS) for file in _file(folder / CHECKPOINTS / f"{n}.ckpt")],
        last_logged=datetime.fromtimestamp(max(times), UTC) if times else None,
    )


def _by_updates(events: Callable[[str], list[Any]], tag: str) -> dict[int, Any]:
    """Return events by updates made; of what was logged again after resuming, the later."""
    # Lightning numbers updates from 0.
    found = {event.step + 1: event for event in sorted(events(tag), key=lambda event: event.wall_time)}
    return dict(sorted(found.items()))


def _curve(events: dict[int, Any]) -> Curve:
    return {updates: float(event.value) for updates, event in events.items() if math.isfinite(event.value)}


def _buckets(histogram: Any) -> Histogram:
    edges = list(histogram.bucket_limit)
    return [(lower, upper, n) for lower, upper, n in zip(edges, edges[1:], histogram.bucket[1:], strict=False) if n]


def _sample(event: Any) -> str:
    """Return a sample as it was written: on the board its lines are indented by four."""
    text = event.tensor_proto.string_val[0].decode("utf-8", errors="replace")
    return "\n".join(line.removeprefix("    ") for line in text.split("\n"))


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the end of a line that a killed process began
            continue
        if isinstance(entry, dict) and {"event", "time", "step"} <= entry.keys():
            found.append(entry)
    return found


def _file(path: Path) -> list[CheckpointFile]:
    """Return a checkpoint, which may be a folder of shards, in a list; an empty one where it is not there."""
    try:
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in inside if part.is_file())
        return [CheckpointFile(path.name, size, datetime.fromtimestamp(path.stat().st_mtime, UTC))]
    except FileNotFoundError:
        return []
