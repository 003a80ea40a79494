"""Train for a long time, saving and validating often, and report whether memory, open files and disk stay bounded."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 0.2
"""Share of the time that is not counted: buffers grow to their size."""


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long; %(default)s")
    minutes = parser.parse_args().minutes
    folder = Path(tempfile.mkdtemp(prefix="mmrec-soak-"))
    options = "--trainer.max_steps=-1 --trainer.val_check_interval=100 --last.every_n_train_steps=20"
    patient = "--early_stopping.patience=1000000 --trainer.enable_progress_bar=false"
    command = f"{sys.executable} -m mmrec fit -c quickstart -c corpus/sample {options} {patient} --run soak"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    checkpoints = folder / "lightning_logs" / "soak" / "checkpoints"
    samples: list[tuple[float, int, int, int, int]] = []
    began = time.monotonic()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command.split(), cwd=folder, env=environment, stdout=output, stderr=output)
        while time.monotonic() - began < 60 * minutes and process.poll() is None:
            time.sleep(5)
            files = list(checkpoints.glob("*.ckpt")) if checkpoints.exists() else []
            samples.append(
                (
                    time.monotonic() - began,
                    resident(process.pid),
                    len(os.listdir(f"/proc/{process.pid}/fd")),
                    len(files),
                    sum(path.stat().st_size for path in files),
                )
            )
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
    if status != 143:
        sys.exit(f"the training ended with status {status}:\n{(folder / 'output.txt').read_text()[-2000:]}")
    counted = [sample for sample in samples if sample[0] > WARM_UP * 60 * minutes]
    _, memory, descriptors, numbers, sizes = (list(column) for column in zip(*counted, strict=True))
    third = max(1, len(memory) // 3)
    first, final = (sum(part) / len(part) for part in (memory[:third], memory[-third:]))
    print(
        f"{minutes:g} minutes, {len(counted)} samples after the first {WARM_UP:.0%}: resident memory "
        f"{min(memory) / 2**20:.0f} to {max(memory) / 2**20:.0f} MiB, mean of the last third against the first "
        f"{final / first - 1:+.2%}; open files {min(descriptors)} to {max(descriptors)}; checkpoints "
        f"{min(numbers)} to {max(numbers)} files, {max(sizes) / 2**20:.1f} MiB at most"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
