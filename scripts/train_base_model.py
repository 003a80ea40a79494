"""Train a model: ``mmrec fit`` under the options of the original plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    import mmrec  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmrec import cli
from mmrec.checkpoints.runs import BEST, LAST, new_run
from mmrec.core.errors import UserError, exit_status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", default="tiny", help="size of the model, or a config file; %(default)s if left out"
    )
    parser.add_argument("--data_dir", help="folder that prepare_real_dataset.py wrote; the sample corpus if left out")
    parser.add_argument("--epochs", help="times that the text is read")
    parser.add_argument("--batch_size", help="rows that are read side by side")
    parser.add_argument("--seq_len", help="tokens that a row reads in one batch")
    parser.add_argument("--learning_rate", help="the highest learning rate")
    parser.add_argument("--warmup_steps", help="updates over which the learning rate rises")
    parser.add_argument(
        "--save_best_model",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the model of the lowest validation loss as best.ckpt and score it at the end; else the last one",
    )
    parser.add_argument("--early_stopping_patience", help="validations without a better loss before training stops")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run from its last checkpoint")
    return parser


def fit_arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments of ``mmrec fit`` that mean the same as ``args``."""
    options = {
        "trainer.max_epochs": args.epochs,
        "data.batch_size": args.batch_size,
        "data.seq_len": args.seq_len,
        "model.learning_rate": args.learning_rate,
        "model.warmup_steps": args.warmup_steps,
        "early_stopping.patience": args.early_stopping_patience,
        "best.save_top_k": None if args.save_best_model else 0,
        "run": args.resume or new_run(Path()),
        "ckpt_path": "last" if args.resume else None,
    }
    data = ["--data.data_dir", args.data_dir] if args.data_dir else ["--config", "corpus/sample"]
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["fit", "--config", args.config, *data, *given]


def main(args: Sequence[str]) -> int:
    """Run with ``args`` and return the exit status, as :func:`mmrec.cli.main`."""
    status = 0

    def command() -> None:
        nonlocal status
        given = _parser().parse_args(args)
        fit = fit_arguments(given)
        status = cli.main(fit)
        if status == 0:
            run = next(arg.removeprefix("--run=") for arg in fit if arg.startswith("--run="))
            which = BEST if given.save_best_model else LAST
            status = cli.main(["validate", "--run", run, "--ckpt_path", which])

    return exit_status(command, Path(__file__).name) or status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
