"""Without what only Linux has: locks, the swap of names, writing at a place, signals, processors that are counted."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mmrec.core import file_system, files
from mmrec.core.files import staged_folder, write_file

LINUX_ONLY = (
    r"\bos\.(O_DIRECTORY|O_NOFOLLOW|O_NONBLOCK|O_TMPFILE|fork|pread|pwrite|sched_\w+|posix_\w+|mkfifo|killpg|setsid|getuid|"
    r"geteuid|uname|nice|getloadavg|sendfile|wait\w*)\b|\bsignal\.(SIG(?!INT\b|TERM\b|_DFL\b|nals\b)\w+|pthread_\w+|alarm)|"
    r"\bimport (fcntl|resource|pwd|grp|termios)\b|add_signal_handler|get_context\(.fork"
)
QUICK = "--trainer.enable_progress_bar false --trainer.limit_val_batches 1"


def run_without(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run commands in a process that has lost what Windows does not have."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tests" / "plain_system.py"), *lines]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="takes away what only Linux has")
def test_the_commands_run_without_what_windows_lacks(tmp_path: Path, text: str) -> None:
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    config = "--model.config.dim 16 --model.config.layers 2 --model.config.heads 2 --model.config.ffn_dim 24"
    done = run_without(
        tmp_path,
        "prepare --input_file novel.txt --output_dir data/b",
        "prepare --input_file novel.txt --output_dir data/b --tokenizer characters --force",
        f"train novel.txt --minutes 0.1 --trainer.max_steps 6 --trainer.val_check_interval 2 {QUICK}",
        f"train novel.txt --minutes 0.1 --trainer.max_steps 8 {QUICK}",
        f"fit --data.data_dir data/b --run b {config} --trainer.max_steps 4 {QUICK}",
        f"fit --run b --ckpt_path last --trainer.max_steps 6 {QUICK}",
        "generate --run b --length 20",
        "read novel.txt --run b --learn --save a.mem",
        "score novel.txt --memory a.mem --run b",
        "export --format safetensors --run b --output_dir out",
        "report b",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "It writes:" in done.stdout
    assert "longer      lightning_logs" in done.stdout
    left = [str(path) for path in tmp_path.rglob("*.part*")]
    assert left == []


def test_what_only_linux_has_is_asked_for_in_one_place() -> None:
    package = REPOSITORY / "mmrec"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(LINUX_ONLY, path.read_text(encoding="utf-8"))
    }
    assert found == {"core/file_system.py", "core/forks.py", "core/threads.py"}


def test_files_are_opened_with_an_encoding() -> None:
    """Windows reads and writes another one where none is given."""
    for path in (REPOSITORY / "mmrec").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in call.keywords):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            opens = name == "open" and isinstance(call.func, ast.Name)
            mode = ast.unparse(call.args[1]) if opens and len(call.args) > 1 else "r"
            assert not isinstance(call.func, ast.Attribute) or name not in ("read_text", "write_text"), (
                f"{path}:{call.lineno}"
            )
            assert not opens or "b" in mode, f"{path}:{call.lineno}"


def test_files_are_whole_or_absent_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "HAS_LOCKS", False)
    monkeypatch.setattr(files, "exchange_names", lambda *paths: False)
    write_file(tmp_path / "a", "one")
    write_file(tmp_path / "a", "two")
    for content in ("one", "two"):
        with staged_folder(tmp_path / "folder") as folder:
            (folder / "b").write_text(content, encoding="utf-8")
    assert (tmp_path / "folder" / "b").read_text(encoding="utf-8") == "two"
    with pytest.raises(KeyError), staged_folder(tmp_path / "folder") as folder:
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "two"


def test_bytes_are_written_at_their_place_without_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite", raising=False)
    with open(tmp_path / "a", "wb", buffering=0) as file:
        file_system.write_at(file, 3, b"def")
        file_system.write_at(file, 0, b"abc")
    assert (tmp_path / "a").read_bytes() == b"abcdef"
