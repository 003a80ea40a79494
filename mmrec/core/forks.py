"""Processes that begin as copies of this one: they need not start Python and import everything again."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmrec.core.errors import UserError

T = TypeVar("T")


def can_fork() -> bool:
    """Return whether a copy of this process can train a model.

    torch computes no gradients in a copy of a process whose threads for GPUs have begun, nor with the threads of one
    that has several; it does not say so before. So a first copy tries. Only Linux has copies that can be relied on.
    """
    import torch

    if not (sys.platform.startswith("linux") and hasattr(os, "fork")):
        return False
    # Gradients are computed by a thread for each GPU, which cannot use it in a copy, on a CPU too.
    if threading.active_count() > 1 or torch.get_num_threads() > 1 or torch.cuda.is_available():
        return False
    return wait_for(fork(_compute_gradient)) == 0


def _compute_gradient() -> int:
    import torch

    try:
        torch.zeros(1, requires_grad=True).sum().backward()
    except RuntimeError:
        return 1
    return 0


def fork(function: Callable[[], int]) -> int:
    """Call ``function`` in a copy of this process, which ends with the status that it returns; return its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the copy would write it again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where a library has threads
        number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not copied
        status = function()
    except KeyboardInterrupt:  # a terminal sends Ctrl-C to all processes, and the first says so
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(status)


def wait_for(number: int) -> int:
    """Return the exit status of the process ``number`` when it has ended, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def end(numbers: Sequence[int], seconds: float) -> None:
    """Wait for processes to end, and end those that have not after some seconds."""
    left, until = list(numbers), time.monotonic() + seconds
    while left := [number for number in left if os.waitpid(number, os.WNOHANG)[0] == 0]:
        if time.monotonic() > until:
            for number in left:
                os.kill(number, signal.SIGKILL)
                wait_for(number)
            return
        time.sleep(0.01)


def call_in_copies(function: Callable[[int], T], count: int) -> list[T]:
    """Return what ``function`` returns in each of ``count`` copies of this process, which call it at once.

    Each gives it its number, from 0.

    Raises:
        UserError: the system has ended one of them.
        Exception: what the function raised.
    """
    begun = []
    for rank in range(count):
        source, target = os.pipe()

        def send(rank: int = rank, target: int = target) -> int:
            try:
                answer: tuple[bool, object] = True, function(rank)
            except Exception as error:  # it is raised where it is waited for
                answer = False, error
            with open(target, "wb") as file:
                pickle.dump(answer, file)
            return 0

        begun.append((fork(send), source))
        os.close(target)
    answers: list[bytes] = []
    for number, source in begun:
        with open(source, "rb") as file:
            answers.append(file.read())
        wait_for(number)
    if not all(answers):
        raise UserError("the system has ended a process of this command, perhaps since there is too little memory")
    results: list[T] = []
    for answer in answers:
        succeeded, value = pickle.loads(answer)
        if not succeeded:
            raise value
        results.append(value)
    return results
