"""What a training in a process of its own is prepared with, so that it ends at a moment, or meets a full disk."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from helpers import kill_here

Moment = tuple[str, int, float]
"""Where to die: ("step", updates, seconds after), or (a stage of saving, saves before, share of the file)."""
STAGES = ("write", "checksum", "fsync", "link", "rename", "folder")


def die(moment: Moment) -> None:
    """Arrange for this process to be killed at ``moment``."""
    where, count, extra = moment
    if where == "step":

        def die_later() -> None:
            time.sleep(extra)
            kill_here()

        _after_step(count, lambda: threading.Thread(target=die_later).start())
    else:
        _inside_save(where, count, extra)


def _after_step(count: int, action: Callable[[], object]) -> None:
    from mmrec.training.callbacks.checkpointing import LastCheckpoint

    steps, before = 0, LastCheckpoint.on_train_batch_end

    def on_train_batch_end(self: LastCheckpoint, *args: object) -> None:
        nonlocal steps
        steps += 1
        if steps == count:
            action()
        before(self, *args)  # type: ignore[arg-type]

    LastCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign,assignment]


def _inside_save(stage: str, count: int, share: float) -> None:
    import torch

    saves = 0
    save: Callable[..., None] = torch.save

    def counted(content: object, writer: object) -> None:
        nonlocal saves
        saves += 1
        if saves == count and stage == "write":
            write, written = writer.write, 0  # type: ignore[attr-defined]

            def die_within(data: bytes) -> int:
                nonlocal written
                if written + len(data) > share * 40_000:
                    write(data[: int(len(data) * share)])
                    writer.file.flush()  # type: ignore[attr-defined]
                    kill_here()
                written += len(data)
                return int(write(data))

            writer.write = die_within  # type: ignore[attr-defined]
        save(content, writer)
        if saves == count and stage == "checksum":
            kill_here()

    torch.save = counted  # type: ignore[assignment]
    names = {"fsync": "fsync", "link": "link", "rename": "replace", "folder": "fsync"}
    if stage in names:
        real = getattr(os, names[stage])
        calls = 0

        def deadly(*args: object) -> object:
            nonlocal calls
            calls += saves >= count
            # Killed before the call or just after it; "folder" is the second fsync of a save.
            if saves >= count and calls == (2 if stage == "folder" else 1):
                if share > 0.5:
                    real(*args)
                kill_here()
            return real(*args)

        setattr(os, names[stage], deadly)


def limit_file_size(steps: int, size: int) -> None:
    """After ``steps`` updates no file can be longer than ``size`` bytes, as on a disk that is full."""
    _after_step(steps, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def lift_file_size(steps: int, size: int, later: int) -> None:
    """The same, and after ``later`` updates there is room again."""
    limit_file_size(steps, size)
    _after_step(
        later, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    )


def linger(step: int, seconds: float) -> None:
    """Make the update ``step`` take ``seconds``."""

    def wait() -> None:
        Path("lingering").touch()
        time.sleep(seconds)

    _after_step(step, wait)


def obey_permissions() -> None:
    """Give up what lets root write where nobody may: all capabilities of this process (capset(2), version 3)."""
    nothing = struct.pack("6I", *[0] * 6)
    if ctypes.CDLL(None, use_errno=True).capset(struct.pack("Ii", 0x20080522, 0), nothing):
        raise OSError(ctypes.get_errno(), "capset")
