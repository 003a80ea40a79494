"""The Dockerfile, as far as it can be checked without a daemon: its stages, what they copy, and what they install."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

INSTRUCTIONS = {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "ENV", "ARG"}


def instructions() -> list[tuple[str, str]]:
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, rest in found]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage by its name, after those of the stage that it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base in found or re.fullmatch(r"[a-z]+:[\w.-]+", base), base
            current = found[stage] = list(found.get(base, []))
        current.append((name, rest))
    return found


def test_instructions_are_known_and_stages_are_named_before_they_are_used() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert list(stages()) == ["wheel", "base", "cuda", "cpu"]  # the last one is the default
    for source in re.findall(r"--from=(\w+)", (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")):
        assert source == "wheel"


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_what_runs_is_mmrec_and_not_root(stage: str) -> None:
    steps = stages()[stage]
    assert steps[-1] == ("USER", "1000")
    assert ("ENTRYPOINT", '["mmrec"]') in steps
    installs = " ".join(rest for name, rest in steps if name == "RUN")
    assert "--constraint /wheels/constraints.txt" in installs
    (torch,) = re.findall(r"^torch==\S+", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"torch==\S+", installs) == [torch]
    assert (("ARG", "PIP_EXTRA_INDEX_URL") in steps) == (stage == "cpu")
    assert "://" not in installs


def test_what_is_copied_is_let_through() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "**"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((REPOSITORY / name).exists() for name in allowed)
    assert {"mmrec", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == allowed
