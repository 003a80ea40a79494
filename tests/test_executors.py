"""The same shards on other executors: a Ray cluster of two nodes, one of which dies; the scripts for Slurm."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command
from layouts import texts, tokens_of, write_json_lines

pytest.importorskip("datatrove")
# The executors leave some files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


STARTER = """
import sys, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """Two Ray nodes on this machine, in processes of their own; a line of input kills the second."""
    pytest.importorskip("ray")
    environment = os.environ | {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(mmrec: Command, tmp_path: Path, cluster: subprocess.Popen[str]) -> None:
    pieces = texts(600)
    for k in range(8):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl", pieces[k::8] * 150)
    options = ["--tokenizer", "bpe", "--vocab_size", "400"]
    assert mmrec("prepare", "in", "--output_dir", "local", "--workers", "1", *options) == 0

    assert cluster.stdin is not None
    assert cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    assert address, "the cluster did not start"
    command = [sys.executable, "-m", "mmrec", "prepare", "in", "--output_dir", "ray", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--executor", "ray", *options],
        env=os.environ | {"RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    done: list[Path] = []
    while not done and process.poll() is None and time.monotonic() < deadline:
        done = list(Path("ray.work").glob("0*.json"))
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    cluster.stdin.write("kill\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline().strip() == "removed"
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert tokens_of(Path("ray")) == tokens_of(Path("local"))


def test_the_scripts_for_slurm(
    mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for sbatch keeps the script; its task, run by hand as Slurm would, does the work."""
    pieces = texts()
    for k in range(3):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl", pieces[k::3])
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = folder / "sbatch"
    keep = f'for last; do :; done\n[ -e {tmp_path}/job.sh ] || cp "$last" {tmp_path}/job.sh\n'
    sbatch.write_text(f'#!/bin/sh\n{keep}echo "Submitted batch job 7"\n')
    (folder / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    command = ["prepare", "in", "--output_dir", "out", "--executor", "slurm", "--workers", "2"]
    slurm = '{"partition": "cpu", "time": "1:00:00"}'
    assert mmrec(*command, "--slurm", slurm) == 0
    assert "handed to Slurm" in capsys.readouterr().out
    script = (tmp_path / "job.sh").read_text()
    for line in ("--partition=cpu", "--time=1:00:00", "--array=0-2%2", "--job-name=mmrec"):
        assert f"#SBATCH {line}" in script, script
    assert not Path("out").exists()

    (run,) = [line for line in script.splitlines() if "launch_pickled_pipeline" in line]
    for task in range(3):
        step = re.sub(r"srun +-l -n 1 ", "", script)
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
        environment |= {
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_MEM_PER_CPU": "1024",
            "SLURM_NODELIST": "localhost",
            "SLURM_GPUS_ON_NODE": "0",
        }
        ran = subprocess.run(["bash", "-c", step], env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{run}\n{ran.stdout}\n{ran.stderr}"
    assert mmrec(*command, "--slurm", slurm) == 0
    assert mmrec("prepare", "in", "--output_dir", "local", "--workers", "1") == 0
    assert tokens_of(Path("out")) == tokens_of(Path("local"))


def test_digests_tell_folders_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert tokens_of(tmp_path) == {"a": hashlib.sha256(b"x").hexdigest()}
