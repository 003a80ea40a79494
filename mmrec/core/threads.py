"""How many threads torch computes with, and how they wait for each other.

A second thread helps where the parts of an operation are large beside the waiting for each other, and costs much
where another program wants the core: thousands of operations a second then wait for a thread that does not run. The
number follows from sizes alone, so the same command gives the same bits each time it is run on a machine. What the
user sets by the variables of OpenMP counts before all that is decided here.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

NUMBER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CHOSEN_VARIABLE = "MMREC_CHOSE_THREADS"
"""Set where this program, not the user, set OMP_NUM_THREADS for the processes that it starts."""
SPIN_COUNT = "1000"
"""Turns, a few microseconds, that a thread of GNU's OpenMP waits before it gives its core to others; its default is
300,000."""
PRODUCT_SHARE = 2**25
"""Multiplications of one D x D matrix product that a thread has at least: twice those of an update of quickstart."""
PROCESS_SHARE = 2**23
"""Multiplications of one D x D matrix product that a process of a training has at least: half those of an update of
quickstart."""
WEIGHTS_SHARE = 2**18
"""Weights of a D x D matrix that a thread has at least, where a token is read at a time."""
CPU_MAX, MEMORY_MAX = (Path("/sys/fs/cgroup", name) for name in ("cpu.max", "memory.max"))


def is_set_by_user() -> bool:
    """Return whether the user has set the number of threads."""
    return CHOSEN_VARIABLE not in os.environ and any(name in os.environ for name in NUMBER_VARIABLES)


def cores_by_affinity() -> int:
    """Return the number of cores that this process may run on; all of them where a system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores(cpu_max: Path = CPU_MAX) -> int:
    """Return the number of cores that this process may keep busy: by its affinity and its container's quota."""
    cores = cores_by_affinity()
    try:
        quota, period = cpu_max.read_text(encoding="utf-8").split()
        cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or no quota: "max"
        pass
    return max(1, cores)


def available_memory(memory_max: Path = MEMORY_MAX) -> int:
    """Return the bytes of memory that there are, used or not: the machine's, or its container's."""
    known = hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else sys.maxsize
    with suppress(OSError, ValueError):  # no such file, or no limit: "max"
        memory = min(memory, int(memory_max.read_text(encoding="utf-8")))
    return memory


def threads_that_pay(dim: int, tokens: int, cores: int) -> int:
    """Return the number of threads for a model: one, where a second would bring less than 1.3 times.

    Args:
        dim: width of the model, D.
        tokens: read at a time, over all rows.
        cores: those that are there for this process.
    """
    return max(1, min(cores, max(tokens * dim**2 // PRODUCT_SHARE, dim**2 // WEIGHTS_SHARE)))


def processes_that_pay(dim: int, rows: int, seq_len: int, cores: int) -> int:
    """Return the number of processes that share out the rows of a batch: each has as many, and enough to do.

    Args:
        dim: width of the model, D.
        rows: of a batch.
        seq_len: tokens of a row.
        cores: those that are there.
    """
    most = min(cores, rows, rows * seq_len * dim**2 // PROCESS_SHARE)
    return max((count for count in range(2, most + 1) if rows % count == 0), default=1)


def share_out(costs: list[int], workers: int) -> list[int]:
    """Return for each of ``costs`` the thread or process that bears it, so that all bear about as much."""
    borne, owners = [0] * workers, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = borne.index(min(borne))
        borne[owners[number]] += costs[number]
    return owners


def use_threads(dim: int, tokens: int = 1, processes: int = 1, before: int | None = None) -> int:
    """Make torch compute with as many threads as pay, unless the user has set a number; return how many they are.

    Args:
        dim: width of the model, D.
        tokens: read at a time, over all rows.
        processes: that share the cores.
        before: the number that a run which is resumed was trained with: it is kept where there are cores enough.
    """
    import torch

    if not is_set_by_user():
        cores = max(1, available_cores() // processes)
        torch.set_num_threads(threads_that_pay(dim, tokens, cores) if before is None else min(before, cores))
    return torch.get_num_threads()


def import_torch() -> None:
    """Import torch with one thread, and threads that wait for each other without keeping others from the core.

    Its OpenMP reads both from the environment, once; the number of threads can be changed later, by
    :func:`use_threads`.
    """
    if not any(name in os.environ for name in WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    chooses = not any(name in os.environ for name in NUMBER_VARIABLES)
    if chooses:
        os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    if chooses:
        del os.environ["OMP_NUM_THREADS"]  # or it would be taken for the user's
        torch.set_num_threads(1)  # where torch had been imported before


def keep_for_other_processes(threads: int) -> None:
    """Let the processes that this one starts compute with ``threads`` threads each, unless the user set a number.

    Lightning would set all cores divided by the processes.
    """
    if not any(name in os.environ for name in NUMBER_VARIABLES):
        os.environ |= {"OMP_NUM_THREADS": str(threads), CHOSEN_VARIABLE: "1"}
