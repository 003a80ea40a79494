"""How many threads torch computes with: by the user, the cores, and the sizes of the model and of its batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from helpers import fit, last

from mmrec.core import threads
from mmrec.core.options import shipped_configs
from mmrec.inference.reading import READ_CHUNK


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without variables of the user's, on 16 cores; its number of threads is put back."""
    for name in (*threads.NUMBER_VARIABLES, *threads.WAITING_VARIABLES, threads.CHOSEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 16)
    numbers = [torch.get_num_threads()]
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])


def sizes(config: str) -> tuple[int, int]:
    """Return the width of the model of a shipped config, and the tokens of its batches."""
    content = yaml.safe_load(shipped_configs()[config].read_text())
    return content["model"]["config"]["dim"], content["data"]["batch_size"] * content["data"]["seq_len"]


@pytest.mark.parametrize(
    ("config", "expected"), [("quickstart", 1), ("tiny", 1), ("mini", 16), ("small", 16), ("base", 16), ("7b", 16)]
)
def test_threads_follow_the_size_of_the_matrix_products(config: str, expected: int) -> None:
    dim, tokens = sizes(config)
    assert threads.use_threads(dim, tokens) == expected
    assert threads.threads_that_pay(dim, tokens, cores=1) == 1


def test_a_small_model_reads_and_writes_with_one_thread_and_a_large_one_with_more() -> None:
    small, large = sizes("quickstart")[0], sizes("base")[0]
    assert threads.use_threads(small) == threads.use_threads(small, READ_CHUNK) == 1
    assert threads.use_threads(large) == 4
    assert threads.use_threads(large, processes=8) == 2
    assert threads.use_threads(large, READ_CHUNK) == 16


@pytest.mark.parametrize("name", threads.NUMBER_VARIABLES)
def test_the_number_that_the_user_sets_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    before = torch.get_num_threads()
    assert threads.use_threads(4096, 4096) == threads.use_threads(4096, 4096, before=7) == before
    threads.keep_for_other_processes(1)
    assert threads.CHOSEN_VARIABLE not in os.environ


def test_a_resumed_run_keeps_its_number_where_there_are_cores_enough() -> None:
    assert threads.use_threads(4096, 4096, before=3) == 3
    assert threads.use_threads(16, 64, before=3) == 3
    assert threads.use_threads(4096, 4096, before=32) == 16


def test_processes_that_are_started_choose_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (threads.CHOSEN_VARIABLE, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "0")  # put back at the end
        monkeypatch.delenv(name)
    threads.keep_for_other_processes(1)
    assert os.environ["OMP_NUM_THREADS"] == "1"  # Lightning would set the cores divided by the processes
    assert not threads.is_set_by_user()
    assert threads.use_threads(4096, 4096, processes=2) == 8


@pytest.mark.parametrize(
    ("content", "expected"), [("250000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)]
)
def test_the_quota_of_a_container_counts(
    content: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    (tmp_path / "cpu.max").write_text(content)
    assert threads.available_cores(tmp_path / "cpu.max") == (6 if expected is None else expected)
    assert threads.available_cores(tmp_path / "none") == 6


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 1_000_000), ("max", None), ("", None)])
def test_the_memory_is_that_of_the_container(tmp_path: Path, limit: str, expected: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit, encoding="utf-8")
    whole = threads.available_memory(tmp_path / "none")
    assert whole > 10**8
    assert threads.available_memory(tmp_path / "memory.max") == (expected or whole)


PROGRAM = """
import os
from mmrec.core.runtime import configure
configure()
import torch
print(torch.get_num_threads(), os.environ["GOMP_SPINCOUNT"], os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1 1000 None"), ({"GOMP_SPINCOUNT": "7"}, "1 7 None"), ({"OMP_NUM_THREADS": "2"}, "2 1000 2")],
    ids=["nothing", "waiting", "number"],
)
def test_a_command_begins_with_one_thread_unless_told(given: dict[str, str], expected: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()} | given
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == expected


def test_a_run_keeps_its_number_and_says_so_where_it_cannot(
    mmrec: Command, prepared: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["--trainer.max_epochs=-1", "--run=a"]
    monkeypatch.setattr(threads, "threads_that_pay", lambda dim, tokens, cores: 3)
    assert mmrec(*fit(prepared, *steps, "--trainer.max_steps=2")) == 0
    assert last("a")["mmrec_progress"]["threads"] == 3
    monkeypatch.setattr(threads, "threads_that_pay", lambda dim, tokens, cores: 5)
    assert mmrec(*fit(prepared, *steps, "--ckpt_path=last", "--trainer.max_steps=4")) == 0
    assert last("a")["mmrec_progress"]["threads"] == 3
    assert "thread(s) until now" not in caplog.text
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    assert mmrec(*fit(prepared, *steps, "--ckpt_path=last", "--trainer.max_steps=6")) == 0
    assert last("a")["mmrec_progress"]["threads"] == 2
    assert "trained with 3 thread(s) until now, and goes on with 2" in caplog.text
