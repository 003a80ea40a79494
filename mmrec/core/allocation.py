"""Keep the memory that large tensors free: asking the system for it again costs more than the arithmetic."""

from __future__ import annotations

import ctypes
import sys

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
    except (OSError, AttributeError):  # another C library
        return False
    return all(set_option(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))
