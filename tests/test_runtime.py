"""Pages that large tensors free stay with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys, torch
from mmrec.core.runtime import keep_freed_pages
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


SETTINGS = """
import logging, sys, warnings
from mmrec.core.runtime import configure
configure(computes=sys.argv[1] == "computes")
configure(computes=sys.argv[1] == "computes")
print("torch" in sys.modules, len(logging.getLogger("lightning.fabric.utilities.seed").filters))
if sys.argv[1] == "computes":
    import torch
    print(float(torch.tensor(1e-40) * 1), torch.get_num_threads())
"""


LOADS = """
import sys
from mmrec import MemoryLM
MemoryLM.load(sys.argv[1]).generate("1: to", length=2)
print(*({"lightning", "torchmetrics", "torch._dynamo", "sympy", "scipy"} & set(sys.modules)))
"""


def test_a_model_is_loaded_and_generates_without_what_only_training_needs() -> None:
    checkpoint = str(Path(__file__).parent / "data" / "checkpoint-v2.ckpt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", LOADS, checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []


def test_settings_are_made_once_and_import_torch_only_for_who_computes() -> None:
    def printed(how: str) -> list[str]:
        command = [sys.executable, "-c", SETTINGS, how]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout.splitlines()

    assert printed("nothing") == ["False 1"]
    assert printed("computes") == ["True 1", "0.0 1"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("streams", ["", ">&- ", "2>&- ", "<&- >&- 2>&- "])
def test_any_text_is_printed_on_any_terminal(tmp_path: Path, encoding: str, streams: str) -> None:
    program = (
        "import sys; from mmrec.core.runtime import configure_streams; configure_streams(); "
        "print('caf\\u00e9 \\u65e5 \\udcff'); print('caf\\u00e9 \\u65e5', file=sys.stderr); open('done', 'w').close()"
    )
    ran = subprocess.run(
        f'{sys.executable} -c "{program}" {streams}',
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()},
    )
    assert (ran.returncode, (tmp_path / "done").exists()) == (0, True), ran.stderr
    if not streams:
        assert ran.stdout == "café 日 \udcff\n".encode(encoding, errors="replace")


def test_a_command_works_on_a_terminal_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "r\u00e9sum\u00e9 \u65e5.txt").write_text("a few words of text\n" * 100, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mmrec",
        "prepare",
        "--input_file",
        "r\u00e9sum\u00e9 \u65e5.txt",
        "--output_dir",
        "out",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "r?sum? ?.txt" in ran.stdout
