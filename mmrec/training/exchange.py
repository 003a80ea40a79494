"""What the processes of one machine tell each other through memory that they share, without waiting for the system.

What one process computes in a few milliseconds waits for the other's, thousands of times a minute. gloo sends that
through sockets, and each time the system wakes a process, which takes as long as the sum itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from mmrec.core.errors import UserError
from mmrec.core.file_system import reserve
from mmrec.model.ops.native.build import library
from mmrec.model.ops.native.functions import addresses_and_sizes

LINE = 64
"""Bytes of what each process says of itself."""
SETS = 2
"""Sets of slots, which are used in turn."""
ROOM = 1 << 22
"""Numbers of 4 bytes in a slot, at the most; what is larger is exchanged in parts."""
LIMIT = 1800.0
"""Seconds that a process waits for another: one may write a checkpoint or a text meanwhile."""
SHARED_MEMORY = Path("/dev/shm")
FAILURES = {
    1: f"another process of this training has ended, or did not answer for {LIMIT:.0f} seconds",
    2: "the processes of this training exchange different things: they do not train one model",
}


class ProcessEndedError(UserError):
    """Another process of the training has ended, and knows why."""


@contextmanager
def failures_of_gloo() -> Generator[None]:
    """Raise ProcessEndedError where gloo, by which the processes find each other, tells of another's end."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ProcessEndedError(FAILURES[1]) from error


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("lines", "slots")),
        *((name, ctypes.c_int64) for name in ("room", "rank", "processes")),
        ("limit", ctypes.c_double),
    ]


def kernels() -> Any:
    """Return the compiled kernels; UserError where there are none."""
    found = library(torch.float32)
    if found is None or not hasattr(found, "exchange_mean"):
        raise UserError("the strategy 'cores' needs the compiled kernels, and there are none; use ddp instead")
    return found


class _SharedMemory:
    """Memory that all processes of a group on one machine share: of each a line that says how far it is, and slots.

    Args:
        room: numbers of 4 bytes in a slot, at least.
        slots: of each process.

    Raises:
        UserError: there are no compiled kernels.
    """

    def __init__(self, room: int, slots: int) -> None:
        self._kernels = kernels()
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        room = -(-room // LINE) * LINE
        self._memory = self._map(processes * (LINE + slots * room * 4))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for place, number in ((3, os.getpid()), (4, os.getppid())):
            ctypes.c_int64.from_address(start + rank * LINE + place * 8).value = number
        self._group = _Group(start, start + processes * LINE, room, rank, processes, LIMIT)
        self.rank, self.processes = rank, processes
        distributed.barrier()  # until all have said who they are

    @staticmethod
    def _map(size: int) -> mmap.mmap:
        """Return memory of ``size`` bytes, zero at first, that all processes have, and that goes with the last."""
        given: list[Any] = [None]
        if distributed.get_rank() == 0:
            given[0] = _file_of(size)
        try:
            distributed.broadcast_object_list(given)
            with open(given[0], "r+b") as file:
                memory = mmap.mmap(file.fileno(), size)
            distributed.barrier()
        finally:
            if distributed.get_rank() == 0:
                os.unlink(given[0])
        return memory

    def _call(self, name: str, count: int, *arguments: Any) -> None:
        failed = getattr(self._kernels, name)(ctypes.byref(self._group), ctypes.c_int64(count), *arguments)
        if failed:
            raise (ProcessEndedError if failed == 1 else UserError)(FAILURES[failed])


class Exchange(_SharedMemory):
    """Memory in which all processes of a group exchange tensors; all must call its methods in the same order.

    Args:
        numbers: float32 numbers that are exchanged at once, if there is room for them.

    Raises:
        UserError: there are no compiled kernels.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__(min(numbers, ROOM), SETS)
        self._relay: Relay | None = None

    def relay(self, numbers: int) -> Relay:
        """Return the relay of these processes, for as many ``numbers`` as at the first call, which makes it."""
        if self._relay is None:
            self._relay = Relay(numbers)
        return self._relay

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Make each of ``tensors``, contiguous and float32, the mean of all processes' ones, to the same bits."""
        given = list(tensors)
        self._call("exchange_mean", len(given), *addresses_and_sizes(given))

    def mean_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make the gradient of each of ``parameters``, where it has one, the mean of all processes' ones."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shared = [each for each in gradients if each.dtype == torch.float32 and each.is_contiguous()]
        self.mean(shared)
        known = {id(each) for each in shared}
        for each in gradients:
            if id(each) not in known:
                distributed.all_reduce(each)
                each /= self.processes

    def gather(self, own: Tensor) -> Tensor:
        """Return all processes' ``own``, of one shape [M, ...], behind each other."""
        own = own.contiguous()
        everyone = own.new_empty(self.processes * len(own), *own.shape[1:])
        addresses = (ctypes.c_void_p(each.data_ptr()) for each in (own, everyone))
        self._call("exchange_copies", own.nbytes, *addresses)
        return everyone


class Relay(_SharedMemory):
    """Memory by which each process hands tensors on to the next one, and the last to the first.

    A place in it is written to again once the next process has read what stands there: that is so where what is
    written has followed from what the next process made of it, round all processes, or after an exchange.

    Args:
        numbers: of 4 bytes that a process may hand on before the next one has taken any.

    Raises:
        UserError: there are no compiled kernels.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__(numbers, 1)
        self._reserved = 0

    def reserve(self, counts: int) -> int:
        """Return the count that the next ``counts`` ones come after; all processes reserve the same."""
        before = self._reserved
        self._reserved += counts
        return before

    def give(self, tensor: Tensor, place: int, count: int) -> None:
        """Hand ``tensor`` on, at the byte ``place``; ``count``, which only rises, says that it is there."""
        self._copy("relay_give", tensor.contiguous(), place, count)

    def take(self, tensor: Tensor, place: int, count: int) -> None:
        """Fill ``tensor``, contiguous, from the byte ``place``, once the process before has said ``count``."""
        self._copy("relay_take", tensor, place, count)

    def _copy(self, name: str, tensor: Tensor, place: int, count: int) -> None:
        self._call(
            name, count, ctypes.c_int64(place), ctypes.c_int64(tensor.nbytes), ctypes.c_void_p(tensor.data_ptr())
        )


def _file_of(size: int) -> str:
    """Return the path of a new file of ``size`` bytes, in memory where there is room."""
    for folder in (SHARED_MEMORY, None):
        if folder is not None and not folder.is_dir():
            continue
        handle, path = tempfile.mkstemp("mmrec", dir=folder)
        try:
            reserve(handle, size)  # a page that there is no room for would end the process later
            return path
        except OSError:
            os.unlink(path)
        finally:
            os.close(handle)
    raise UserError(f"there is no room for {size / 1e6:.0f} MB that processes share; use --trainer.strategy ddp")


_in_use: list[Exchange] = []
"""That of this process, while it trains with others of its machine."""


def in_use() -> Exchange | None:
    """Return the exchange by which this process trains with others of its machine, if it does."""
    return _in_use[0] if _in_use else None


def gather_all(own: Tensor) -> Tensor:
    """Return all processes' ``own``, of one shape [M, ...], behind each other; by the exchange if there is one."""
    if _in_use and own.device.type == "cpu":
        return _in_use[0].gather(own)
    everyone = own.new_empty(distributed.get_world_size(), *own.shape)
    distributed.all_gather(list(everyone), own)
    return everyone.flatten(0, 1)


def begin(numbers: int) -> Exchange:
    """Have this process exchange what it shares with others of its machine through memory from now on.

    Args:
        numbers: float32 numbers that are exchanged at once, if there is room for them.
    """
    _in_use[:] = [Exchange(numbers)]
    return _in_use[0]


def end() -> None:
    """Exchange by torch's process group again."""
    _in_use.clear()
