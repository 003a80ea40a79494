"""Settings of the process: made once, where a program starts, before torch computes anything.

A library does not change its caller's process, so the Python API makes none of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
import warnings
from io import TextIOWrapper

from mmrec.core.threads import import_torch

FULL, MIXED = "32-true", "bf16-mixed"
"""Lightning's names of the precisions that are chosen where none is asked for."""
QUIET_WARNINGS = (
    ".*LeafSpec.*is deprecated",  # Lightning's own use of torch
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches",  # of a small text
    "The dirpath has changed",  # a new run from another's checkpoint
    "The `srun` command is available",  # not every run is a job
    "You're using the WeightAveraging",  # it shards only where asked to
    "`ModelCheckpoint\\(monitor=",  # no validation yet since the run was resumed
    r"`?\.fit\(ckpt_path=",  # Lightning looks for one by itself where an OnExceptionCheckpoint is added
    "GPU available but not used",  # by one who asked for the CPU
    "Be aware that when using `ckpt_path`, callbacks",  # those of fit alone
    "FSDP2-wrapped module .* returned a view tensor",  # a layer's state, which nothing changes in place
)
"""Warnings of libraries that a user can do nothing about, as regular expressions of how they begin."""
QUIET_MESSAGES = (
    "Tip:",
    "TPU available",
    "Restoring states from",
    "`weights_only` was not set",
    "Seed set to",
    "has Tensor Cores",
)
"""Parts of such messages in the loggers of :data:`TALKERS`."""
TALKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
)
LOG_LEVELS = {"asyncio": logging.ERROR}  # it warns where a client goes away while it is written to


_command_start = time.monotonic()


def start_command() -> None:
    """Take note that a command starts now."""
    global _command_start
    _command_start = time.monotonic()


def command_start() -> float:
    """Return when the command started, of the monotonic clock: what one that is given minutes counts from."""
    return _command_start


def configure(computes: bool = True) -> None:
    """Make the settings that every command shares; a second call changes nothing.

    Args:
        computes: the command runs a model: also import torch (:func:`mmrec.core.threads.import_torch`), round
            denormal numbers to zero, which fading memories produce and which are many times slower on a CPU, and
            keep the pages that large tensors free.
    """
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in TALKERS:
        logging.getLogger(name).addFilter(_is_of_use)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if computes:
        keep_freed_pages()
        import_torch()
        import torch

        torch.set_flush_denormal(True)


def configure_streams() -> None:
    """Make the standard streams such that a program can print any text to them, and nothing else.

    Those that the process was started without (``>&-``, some daemons) lead nowhere: Python has None for them, which
    libraries do not expect, and the next file that is opened would take their place, so that a checkpoint would be
    what C code prints into. What the encoding of a terminal lacks is shown as a question mark.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # for the processes that are started from here
    os.close(number)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - open as long as the process runs
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    if isinstance(sys.stdout, TextIOWrapper):  # standard error escapes such characters by itself
        sys.stdout.reconfigure(errors="replace")


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning says something that a user can act on."""
    return not any(part in record.getMessage() for part in QUIET_MESSAGES)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_pages() -> bool:
    """Let this process keep the pages that it frees; return whether that could be set.

    glibc gives tensors of more than 32 MiB pages of their own, and the system clears every one of them anew for each
    operation. At 65,536 tokens a row that took two thirds of an update.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return all(set_option(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))


def native_precision(accelerator: str) -> str:
    """Return Lightning's name of the fastest precision that ``accelerator`` has units for.

    Weights, memories and the loss stay in float32 with either. On processors without such units bfloat16 is
    emulated, and slower than float32.

    Args:
        accelerator: Lightning's name, such as "auto", "cpu" or "gpu".
    """
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return MIXED if torch.cuda.is_bf16_supported(including_emulation=False) else FULL
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        has = torch.cpu.get_capabilities()
        return MIXED if has.get("avx512_bf16") or has.get("amx_bf16") else FULL
    return FULL
