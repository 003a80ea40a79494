"""What a release needs: versions that agree, a package that is whole, and scripts/release, which checks that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from mmrec import __version__


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    names = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | names | {"PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)  # another version's than the clone's
    command = ["scripts/release", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def change(file: Path, old: str, new: str) -> None:
    """Replace ``old``, a regular expression that matches once or more, and commit."""
    text, count = re.subn(old, new, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count > 0
    file.write_text(text, encoding="utf-8")
    git(file.parent, "commit", "--all", "--quiet", "--allow-empty", "--message=change")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of this checkout as they are now, in a repository of their own, with a date for this version."""
    names = git(REPOSITORY, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, names):
        source, target = REPOSITORY / name, tmp_path / "clone" / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)
    clone = tmp_path / "clone"
    git(clone, "init", "--quiet")
    git(clone, "add", "--all")
    change(clone / "CHANGELOG.md", rf"^## {re.escape(__version__)} - .*", f"## {__version__} - 2026-12-01")
    return clone


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    versions = [re.fullmatch(r"(\d+\.\d+\.\d+) - (unreleased|\d{4}-\d\d-\d\d)", heading) for heading in headings]
    numbers = [tuple(map(int, version[1].split("."))) for version in versions if version is not None]
    assert len(numbers) == len(headings)
    assert numbers == sorted(numbers, reverse=True)
    assert ".".join(map(str, numbers[0])) == __version__
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__


def test_setup_cfg_lists_every_folder_of_the_package() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "mmrec").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"mmrec.configs"}
    assert set(config["options"]["packages"].split()) == packages


def test_files_that_the_workflow_names_are_there() -> None:
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    names = re.findall(r"\b(?:tests|scripts)/[\w.]+", workflow)
    assert len(names) > 10
    for name in names:
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("kind", ["bug", "idea"])
def test_forms_of_issues_are_whole(kind: str) -> None:
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{kind}.yml").read_text(encoding="utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    assert all(field["attributes"]["label"] for field in fields)


def test_a_release_is_refused_where_something_is_missing(clone: Path) -> None:
    assert release(clone, "--check").stdout == f"release: {__version__} can be released\n"

    (clone / "new.txt").write_text("new")
    refused = release(clone)
    assert (refused.returncode, refused.stderr) == (
        2,
        "release: error: there are changes that are not committed: ?? new.txt\n",
    )
    (clone / "new.txt").unlink()

    refused = release(clone, "--chekc")
    assert (refused.returncode, refused.stderr) == (2, "release: error: unknown option '--chekc'; there is --check\n")

    change(clone / "CITATION.cff", "^version: .*", "version: 0.0.1")
    assert f"CITATION.cff has another version than {__version__}" in release(clone, "--check").stderr
    change(clone / "CHANGELOG.md", r" - 2026-12-01", " - unreleased")
    assert f"no heading '## {__version__} - YYYY-MM-DD'" in release(clone, "--check").stderr
    assert git(clone, "tag") == ""
    assert not (clone / "dist").exists()


@pytest.mark.slow
def test_a_release_builds_and_tags(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the extra test is not installed")
    done = release(clone)
    assert done.returncode == 0, done.stderr
    assert git(clone, "tag") == f"v{__version__}\n"
    assert "### Added" in git(clone, "tag", "--list", "--format=%(contents)")
    with zipfile.ZipFile(clone / "dist" / f"mmrec-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    assert {"mmrec/py.typed", "mmrec/configs/tiny.yaml", "mmrec/serve/page.html"} <= names
    assert not any(name.startswith(("tests/", "docs/", "examples/")) for name in names)
    with tarfile.open(clone / "dist" / f"mmrec-{__version__}.tar.gz") as source:
        inside = {name.partition("/")[2] for name in source.getnames()}
    assert {"CHANGELOG.md", "tests/conftest.py", "docs/index.md", "constraints.txt"} <= inside
    assert f"the tag v{__version__} exists already" in release(clone).stderr
    try_wheel(clone / "dist" / f"mmrec-{__version__}-py3-none-any.whl", tmp_path)


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel alone into an empty environment, outside of the repository, and train there.

    The packages that it needs are those of this test, by their path: CI's job "wheel" downloads them.
    """
    empty = folder / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True, timeout=60)
    python, program = str(empty / "bin" / "python"), str(empty / "bin" / "mmrec")
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=60)
    (packages,) = (empty / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n", encoding="utf-8")
    metadata = message_from_string(next(packages.glob("mmrec-*/METADATA")).read_text(encoding="utf-8"))
    assert metadata["License-Expression"] == "MIT"
    assert "language model" in metadata["Keywords"]
    assert "Operating System :: MacOS" in metadata.get_all("Classifier", [])
    (folder / "novel.txt").write_text("It was a dark and stormy night. The rain fell in torrents.\n" * 60)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [program, "train", "novel.txt", "--minutes=0.1", "--trainer.enable_progress_bar=false"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "It writes:" in done.stdout
    where = [python, "-c", "import mmrec; print(mmrec.__file__)"]
    found = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout).is_relative_to(empty)
