"""Atomic writes: whole or absent, whatever happens in the middle."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import server

from mmrec.core import files
from mmrec.core.files import staged_file, staged_folder, staged_text, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, content: str, keep: Path | None = None) -> None:
    with staged_folder(path, keep) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "a.txt").write_text(content)


def content_of(path: Path) -> str:
    return (path / "inside" / "a.txt" if path.is_dir() else path).read_text()


WRITERS: dict[str, Callable[..., None]] = {
    "file": lambda path, content, keep=None: _write(path, content, keep),
    "folder": write_folder,
}
either = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def _write(path: Path, content: str, keep: Path | None) -> None:
    with staged_file(path, keep) as file:
        file.write(content.encode())


def no_space(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@either
def test_what_is_written_replaces_what_stood_there(tmp_path: Path, write: Callable[..., None]) -> None:
    for content in ("one", "two, longer", "3"):
        write(tmp_path / "a", content)
        assert content_of(tmp_path / "a") == content
    assert names(tmp_path) == ["a"]


def test_texts_are_utf_8_with_their_own_line_ends(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "é\r\nü\n")
    with staged_text(tmp_path / "b") as file:
        file.write("é\r\nü\n")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == "é\r\nü\n".encode()


def test_modes_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
        write_folder(tmp_path / "b", "")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o750]


@either
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_names_the_target_and_leaves_what_stood_there(
    tmp_path: Path, write: Callable[..., None], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    write(target, "before")
    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange_names", lambda *paths: False)  # as where the system has none
        patch.setattr(os, call, no_space)
        with pytest.raises(OSError, match="cannot be written: No space left on device") as caught:
            write(target, "after")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert content_of(target) == "before"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_fills_up_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "before")
    replace, calls = os.replace, 0

    def fail_once(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            no_space()
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange_names", lambda *paths: False)
        patch.setattr(os, "replace", fail_once)
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "a", "after")
    assert content_of(tmp_path / "a") == "before"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_failure_of_a_write_carries_the_name(tmp_path: Path) -> None:

    def fill() -> None:
        with staged_folder(tmp_path / "a") as folder, open("/dev/full", "wb", buffering=0) as full:
            (folder / "part").write_text("some")
            full.write(b"x")

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(Path("/dev/full"), "straight to a device")
    assert caught.value.filename == "/dev/full"
    assert names(tmp_path) == []


def test_an_error_about_another_file_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, staged_file(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert caught.value.filename == str(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


# Places that cannot be written


@either
def test_a_file_where_a_folder_should_be(tmp_path: Path, write: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot be written") as caught:
        write(tmp_path / "file" / "a", "x")
    assert caught.value.filename == str(tmp_path / "file" / "a")
    assert content_of(tmp_path / "file") == "mine"


def test_a_missing_folder_is_named_or_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*no"):
        write_file(tmp_path / "no" / "a", "x")
    write_file(tmp_path / "no" / "deep" / "a", "x", parents=True)
    assert content_of(tmp_path / "no" / "deep" / "a") == "x"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "before")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_file(tmp_path / "a", "after")
    assert content_of(tmp_path / "a") == "before"


UNPRIVILEGED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from victim import obey_permissions
from mmrec.core.files import staged_folder, write_file
obey_permissions()
folder = Path(sys.argv[1])
for write in (lambda: write_file(folder / "a", "after"), lambda: staged_folder(folder / "b").__enter__()):
    try:
        write()
    except PermissionError as error:
        print(error.filename, error.strerror, sep="|")
"""


def test_a_folder_without_permission(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "before")
    tmp_path.chmod(0o500)
    try:
        command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        tmp_path.chmod(0o700)
    said = "cannot be written: Permission denied"
    assert ran.stdout.splitlines() == [f"{tmp_path}/a|{said}", f"{tmp_path}/b|{said}"]
    assert content_of(tmp_path / "a") == "before"
    assert names(tmp_path) == ["a"]


# Links and what is no file


@either
def test_a_link_stays_a_link(tmp_path: Path, write: Callable[..., None]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "a").symlink_to("elsewhere/real")
    for content in ("to a file that is still missing", "and over it"):
        write(tmp_path / "a", content)
        assert (tmp_path / "a").is_symlink()
        assert content_of(elsewhere / "real") == content
    assert names(tmp_path) == ["a", "elsewhere"]
    assert names(elsewhere) == ["real"]


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(OSError, match="cannot be written: Too many levels of symbolic links"):
        write_file(tmp_path / "a", "x")


def test_a_link_in_the_place_of_the_staged_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.part").symlink_to("precious")
    write_file(tmp_path / "a", "x")
    assert (content_of(tmp_path / "a"), content_of(tmp_path / "precious")) == ("x", "mine")


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_file(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"]
    assert names(tmp_path) == ["pipe"]


def test_standard_output_goes_on_after_it_was_written_to(tmp_path: Path) -> None:
    program = "from pathlib import Path; from mmrec.core.files import write_file\n"
    program += "print('before', flush=True); write_file(Path('/dev/stdout'), 'table\\n'); print('after')"
    for command in (f'{sys.executable} -c "{program}" | cat', f'{sys.executable} -c "{program}" >>out.txt'):
        ran = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
        assert ran.stderr == ""
    assert ran.returncode == 0
    assert "after" in (tmp_path / "out.txt").read_text()


# What stood there is kept


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_kept_under_another_name(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_space)
    for content in ("one", "two", "three"):
        _write(tmp_path / "last", content, tmp_path / "previous")
    assert (content_of(tmp_path / "last"), content_of(tmp_path / "previous")) == ("three", "two")
    assert names(tmp_path) == ["last", "previous"]


@pytest.mark.parametrize("exchange", [True, False])
def test_files_and_folders_are_kept_alike(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "exchange_names", lambda *paths: False)
    last, previous = tmp_path / "last", tmp_path / "previous"
    kept = None
    for content, kind in zip(
        "abcdefg", ("folder", "folder", "file", "file", "folder", "file", "folder"), strict=True
    ):
        WRITERS[kind](last, content, previous)
        assert content_of(last) == content
        assert last.is_dir() == (kind == "folder")
        assert kept is None or content_of(previous) == kept
        kept = content
        assert names(tmp_path) == (["last"] if content == "a" else ["last", "previous"])


def test_a_failed_save_leaves_the_one_before_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in ("one", "two"):
        _write(tmp_path / "last", content, tmp_path / "previous")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "last", "three", tmp_path / "previous")
    assert (content_of(tmp_path / "last"), content_of(tmp_path / "previous")) == ("two", "one")


# kill -9, and several at once


def _die(path: Path, kind: str, where: str) -> None:
    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "between the renames":
        files.exchange_names = lambda *paths: False  # type: ignore[attr-defined]
        replace, calls = os.replace, []

        def second(*paths: Any) -> None:
            calls.append(paths)
            if len(calls) == 2:
                die()
            replace(*paths)

        os.replace = second  # type: ignore[assignment]
    elif where != "write":
        setattr(os, where, die)
    if kind == "file":
        with staged_file(path, path.with_name("kept")) as file:
            file.write(b"half of it")
            file.flush()
            if where == "write":
                die()
    else:
        with staged_folder(path) as folder:
            (folder / "half").write_text("of it")
            if where == "write":
                die()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("where", ["write", "fsync", "replace", "link", "between the renames"])
def test_killed_in_the_middle(tmp_path: Path, kind: str, where: str) -> None:
    write = WRITERS[kind]
    if kind == "folder" and where in ("link", "replace"):
        return  # not on its way
    if kind == "file" and where == "between the renames":
        return
    write(tmp_path / "a", "before")
    for _ in range(3):
        victim = server().Process(target=_die, args=(tmp_path / "a", kind, where))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        if where != "between the renames":
            assert content_of(tmp_path / "a") == "before"
        hidden = [name for name in names(tmp_path) if name.startswith(".")]
        assert len(hidden) <= 2, "leftovers pile up"
    with contextlib.suppress(RuntimeError), staged_folder(tmp_path / "a"):
        assert content_of(tmp_path / "a") == "before", "what was being replaced is put back"
        raise RuntimeError
    write(tmp_path / "a", "after")
    assert content_of(tmp_path / "a") == "after"
    assert names(tmp_path) == ["a"]


def _write_often(path: Path, kind: str, letter: str) -> None:
    for _ in range(40):
        WRITERS[kind](path, letter * 50_000)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_several_at_once_write_whole_files(tmp_path: Path, kind: str) -> None:
    write = WRITERS[kind]
    write(tmp_path / "a", "w" * 50_000)
    writers = [server().Process(target=_write_often, args=(tmp_path / "a", kind, letter)) for letter in "xyz"]
    for writer in writers:
        writer.start()
    replaced = [FileNotFoundError] if kind == "folder" else []
    while any(writer.is_alive() for writer in writers):
        with contextlib.suppress(*replaced):  # read across a replacement
            content = content_of(tmp_path / "a")
            assert len(content) == 50_000
            assert len(set(content)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["a"]


def test_without_locks_each_writer_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with staged_file(tmp_path / "a") as one, staged_file(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"other")
        assert one.name != other.name
    assert content_of(tmp_path / "a") == "one"
