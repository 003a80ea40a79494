"""Plot the training and validation loss of runs, from what they logged for TensorBoard."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import mmrec  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmrec.core.errors import UserError, exit_status
from mmrec.core.files import refuse_to_replace_picture


def read_losses(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and losses, in nats/token, under "train/loss" and "val/loss"."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.out.tfevents*")):
        raise UserError(f"{folder}: no loss has been logged here; give the folder of a run in lightning_logs")
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    board.Reload()
    names = {"train/loss", "val/loss"} & set(board.Tags()["scalars"])
    events = {name: board.Scalars(name) for name in names}
    return {name: ([e.step for e in events[name]], [e.value for e in events[name]]) for name in sorted(names)}


def plot(folders: Sequence[Path], output: Path) -> None:
    """Write a picture of the losses of ``folders``."""
    refuse_to_replace_picture(output, "--output")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, folder in enumerate(folders):
        losses = read_losses(folder)
        if "train/loss" in losses:
            label = f"{folder.name}: training, each batch"
            axes.plot(*losses["train/loss"], color=f"C{number}", alpha=0.35, linewidth=1, label=label)
        if "val/loss" in losses:
            steps, values = losses["val/loss"]
            label = f"{folder.name}: validation, best {min(values):.3f}"
            axes.plot(steps, values, color=f"C{number}", marker="o", markersize=4, label=label)
    axes.set(xlabel="updates", ylabel="loss, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def main(args: Sequence[str]) -> int:
    """Run with ``args`` and return the exit status, as :func:`mmrec.core.errors.exit_status`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, for example lightning_logs/quickstart")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write; %(default)s")
    given = parser.parse_args(args)
    return exit_status(lambda: plot(given.runs, given.output), Path(__file__).name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
