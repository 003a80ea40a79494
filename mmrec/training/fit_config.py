"""The config that ``mmrec fit`` would train with, without a training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from mmrec.core.options import resolve_configs
from mmrec.training.cli import SECTIONS, TrainingCLI
from mmrec.training.run_plan import read_request


class _Parsed(Exception):
    """The arguments are read, and nothing else is to be done."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class _ParserOnly(TrainingCLI):
    """Reads its arguments, and goes no further."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        raise _Parsed(self.config.fit)


def fit_config(args: Sequence[str]) -> Any:
    """Return the parsed config of ``mmrec fit`` with ``args``.

    Raises:
        UserError: an option is none of ``mmrec fit``, or has a value that it cannot have.
    """
    known = resolve_configs([*args], SECTIONS)
    try:
        _ParserOnly(read_request("fit", known, None), None, known, ExitStack(), args=["fit", *known])
    except _Parsed as parsed:
        return parsed.config
    raise AssertionError("the parser has not been asked")
