"""Prepare real text for training: ``mmrec prepare`` under the options of the original plan."""

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

from mmrec.core.errors import UserError, exit_status
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--download_tiny_shakespeare", action="store_true", help="download Tiny Shakespeare")
    source.add_argument("--input_file", type=Path, help="a text file of your own")
    source.add_argument("--input_dir", type=Path, help="a folder of text files of your own")
    parser.add_argument("--output_dir", type=Path, help="folder to write; data/CORPUS if left out")
    parser.add_argument("--val_split", type=float, help="share of the text that validates; by its size if left out")
    parser.add_argument("--tokenizer", help="characters, bytes or bpe")
    parser.add_argument("--encoding", default="utf-8", help="of the input files; %(default)s if left out")
    parser.add_argument("--mirror", help="folder or URL that holds Tiny Shakespeare, instead of the internet")
    return parser


def main(args: Sequence[str]) -> int:
    """Run with ``args`` and return the exit status, as :func:`mmrec.core.errors.exit_status`."""

    def command() -> None:
        given = _parser().parse_args(args)
        options = PrepareOptions(
            corpus="tiny_shakespeare" if given.download_tiny_shakespeare else None,
            output_dir=given.output_dir,
            input_file=given.input_file,
            input_dir=given.input_dir,
            val_split=given.val_split,
            tokenizer=given.tokenizer,
            encoding=given.encoding,
            mirror=given.mirror,
        )
        prepare(options)

    return exit_status(command, Path(__file__).name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
