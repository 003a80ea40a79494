"""Pages that large tensors free stay with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from mmrec.core.allocation import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
torch.set_num_threads(1)
def touch():
    for _ in range(20):
        torch.ones(16 << 20)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_a_tensor_of_64_megabytes_is_given_the_same_pages_again() -> None:
    faults = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] * 10 < faults["plain"]
