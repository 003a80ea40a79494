"""The config that ``mmrec fit`` would train with, without a training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmrec.core.errors import UserError, one_line
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


def count_devices(given: Any, device: str) -> int:
    """Return how many devices of a kind the option ``--trainer.devices`` takes.

    Args:
        given: a number, ``auto``, -1 for all, or which ones they are.
        device: type of the device, as torch names it.

    Raises:
        UserError: this machine has not so many, or it is no such number.
    """
    accelerator = AcceleratorRegistry[device]["accelerator"]
    try:
        devices = accelerator.parse_devices(accelerator.auto_device_count() if given == "auto" else given)
        count: int = devices if isinstance(devices, int) else len(devices or ())
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"--trainer.devices is {given}: {one_line(error)}") from None
    if count == 0:
        raise UserError(f"--trainer.devices is {given}; it must be at least 1")
    return count
