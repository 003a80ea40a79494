"""The map of the code in CONTRIBUTING.md is true: folders are layers, and imports go one way."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "mmrec"
ENTRIES = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
APPLICATIONS = {"bench", "evals", "export", "planning", "report", "serve"}


def tree() -> list[Path]:
    """Return the folders and files of the tree in CONTRIBUTING.md, in its order."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("## The files")[2].split("```")[1]
    found: list[Path] = []
    above: list[Path] = [REPOSITORY]
    for indent, name in re.findall(r"^( *)(\S+)", block, re.MULTILINE):
        del above[len(indent) // 4 + 1 :]
        above.append(above[-1] / name)
        found.append(above[-1])
    return found


def rows() -> list[Path]:
    """Return the layers, the lowest first."""
    return [path for path in tree() if path.parent == PACKAGE]


def test_the_tree_has_every_folder() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    folders = {parent for name in listed.stdout.split("\0") if name for parent in (REPOSITORY / name).parents}
    below = {folder for folder in folders if REPOSITORY in folder.parents}
    left_out = {folder for folder in below if folder.parent.name in (".github", "_templates")}
    assert {path for path in tree() if path.suffix != ".py"} == below - left_out


def imported(file: Path) -> set[str]:
    """Return the modules, or names in them, that ``file`` imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    whole = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    parts = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return (
        whole
        | {f"{node.module}.{name.name}" for node in parts for name in node.names}
        | {f"{node.module}" for node in parts}
    )


def file_of(name: str) -> Path | None:
    """Return the file of the module ``name`` of the package, or None where it is no module of it."""
    module = REPOSITORY / name.replace(".", "/")
    found = [path for path in (module.with_suffix(".py"), module / "__init__.py") if path.is_file()]
    return found[0] if found else None


def own_imports() -> dict[Path, set[Path]]:
    """Return, for each file of the package, the files of it that it imports."""
    files = set(PACKAGE.rglob("*.py")) - ENTRIES
    return {file: {found for name in imported(file) if (found := file_of(name))} & files for file in files}


def test_every_folder_has_its_row_and_imports_only_from_those_above_it() -> None:
    place: dict[Path, int] = {}
    for number, row in enumerate(rows()):
        place |= dict.fromkeys(row.rglob("*.py") if row.is_dir() else [row], number)
    graph = own_imports()
    assert set(place) == set(graph)
    for file, others in graph.items():
        for other in others:
            assert place[other] <= place[file], f"{file} imports {other}"


def test_applications_import_nothing_of_each_other() -> None:
    for file, others in own_imports().items():
        mine = file.relative_to(PACKAGE).parts[0]
        if mine in APPLICATIONS:
            theirs = {other.relative_to(PACKAGE).parts[0] for other in others}
            assert not theirs & APPLICATIONS - {mine}, file


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = own_imports()  # but for the package of a file, which names what is public of it
    own = {file: {other for other in others if other.name != "__init__.py"} for file, others in graph.items()}
    assert len(list(graphlib.TopologicalSorter(own).static_order())) == len(graph)


def test_only_training_imports_lightning() -> None:
    for file in own_imports():
        names = {name.partition(".")[0] for name in imported(file)}
        assert "lightning" not in names or PACKAGE / "training" in file.parents, file


def test_files_and_functions_are_short() -> None:
    """A function of over 60 lines or 8 parameters has its reason in a comment on its first line."""
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert len(lines) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [
                    argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                ]
                count = len([name for name in names if name not in ("self", "cls")])
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60 or count > 8:
                    assert " # " in lines[node.lineno - 1], f"{file}: {node.name}: {length} lines, {count} parameters"
