"""Every option that the docs, the configs' comments, the docstrings and the errors name is one of the parsers'."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY

from mmrec.cli import COMMANDS, main
from mmrec.core.errors import UserError
from mmrec.evals.command import OF_CHECKPOINTS
from mmrec.evals.recipes import SMALL
from mmrec.model import ModelConfig

NOT_OURS = {"error-unmatch", "porcelain", "untracked-files", "no-deps", "signal", "option"}
"""Options that the program's texts name and that are git's, pip's and sbatch's, or stand for any."""
FOREIGN = {
    "CONTRIBUTING.md": {"cov", "cov-branch", "cov-report", "cov-fail-under", "dist", "check"},
    "docs/cluster.md": {"address", "head", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint"},
    "docs/export.md": {"device", "include_path", "model_args", "output_path", "tasks", "trust-remote-code"},
    "docs/platforms.md": {"from"},
    "docs/sweeps.md": {f"trainer.logger.{name}" for name in ("save_dir", "tracking_uri", "offline")},
    "docs/serve.md": {"batch_size", "include_path", "model_args", "output_path", "tasks"},
    "docs/training.md": {"logdir", "trainer.logger.save_dir"},
    "README.md": {"logdir"},
    "README.tr.md": {"logdir"},
}
"""Options of others that a page names: ray, torchrun, lm_eval, mlx_lm, tensorboard, pytest, uv, loggers, scripts."""
PAGES = [
    str(path.relative_to(REPOSITORY)) for part in ("*.md", "docs/*.md") for path in sorted(REPOSITORY.glob(part))
]
SOURCES = [str(path.relative_to(REPOSITORY)) for path in sorted(REPOSITORY.glob("mmrec/**/*.py"))]
OPTION = r"(?<![\w-])--([A-Za-z][\w-]*(?:\.\w+)*)(?![\w{])"
GROUPED = r"(?<![\w./-])((?:model|data|trainer|last|best|early_stopping|gradients|limits)(?:\.[a-z]\w*)+)(?![\w/(*])"
"""A setting by its group, as model.dropout; not what is called, and not the path of a file."""
FILES = (".ckpt", ".safetensors", ".onnx", ".md", ".py", ".yaml", ".bin")


@cache
def options_of(command: str) -> frozenset[str]:
    """Return the options of ``mmrec COMMAND`` or of a script, from the help that it prints."""
    if command.endswith(".py"):
        source = (REPOSITORY / "scripts" / command).read_text(encoding="utf-8")
        return frozenset({"help", *re.findall(r"add_argument\(\s*\"--(\w+)\"", source)})
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for name in [*OF_CHECKPOINTS, *SMALL] if command == "eval" else [None]:
            with pytest.raises(SystemExit):
                main([command, *([name] if name else []), "--help"])
    return frozenset(re.findall(OPTION, out.getvalue()))


@cache
def every_option() -> frozenset[str]:
    scripts = [path.name for path in (REPOSITORY / "scripts").glob("*.py")]
    return frozenset({"version"}).union(*(options_of(name) for name in [*COMMANDS, *scripts]))


def groups_of(text: str) -> set[str]:
    """Return the settings that are named by their group in running text or inline code."""
    return {name for name in re.findall(GROUPED, text) if not name.endswith(FILES)}


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def typed(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command that a text has in code, as (name of the command or script, what follows it)."""
    text = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.split(" # ")[0] for block in blocks for line in block.splitlines()]
    for line in [*lines, *inline_code(text)]:
        for found in re.finditer(r"(?:\bmmrec |scripts/)(\w+(?:\.py)?)(.*)", line):
            if found[1] in COMMANDS or found[1].endswith(".py"):
                yield found[1], found[2]


@pytest.mark.parametrize("name", PAGES)
def test_options_in_the_docs(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    ours = re.sub(r"^#SBATCH.*$|`#SBATCH[^`]*`|pip install [^`\n]*|^pip .*$", "", text, flags=re.MULTILINE)
    foreign = FOREIGN.get(name, set())
    for option in set(re.findall(OPTION, ours)) - foreign:
        assert option in every_option() or any(known.startswith(f"{option}.") for known in every_option()), option
    for command, rest in typed(ours):
        assert set(re.findall(OPTION, rest)) <= options_of(command) | foreign, (command, rest)


@pytest.mark.parametrize("name", PAGES)
def test_settings_in_the_docs(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for setting in groups_of(" ".join(inline_code(text))):
        assert setting in every_option(), setting


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_options_in_comments_of_configs(path: Path) -> None:
    comments = " ".join(re.findall(r"#(.*)", path.read_text(encoding="utf-8")))
    for option in {*re.findall(OPTION, comments), *groups_of(comments)}:
        assert option in every_option(), option


def strings(node: ast.AST) -> Iterator[str]:
    """Yield the texts in ``node``; what is filled into one when it runs is a brace."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


@pytest.mark.parametrize("name", SOURCES)
def test_options_in_the_program(name: str) -> None:
    """In errors, docstrings and any other text: options; in errors also settings by their group."""
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    errors = [call for call in calls if getattr(call.func, "id", "") == "UserError"]
    settings = {setting for error in errors for text in strings(error) for setting in groups_of(text)}
    for setting in settings:
        assert setting in every_option(), setting
    for text in strings(tree):
        for option in re.findall(OPTION, text):
            known = option in every_option() or any(other.startswith(f"{option}.") for other in every_option())
            assert known or option in NOT_OURS, option


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ModelConfig(dim=0), "model.config.dim"),
        (lambda: ModelConfig(layers=0), "model.config.layers"),
        (lambda: ModelConfig(heads=3), "model.config.heads"),
        (lambda: ModelConfig(layer_types=()), "model.config.layer_types"),
        (lambda: ModelConfig(layer_types=("shrt",)), "model.config.layer_types"),
    ],
)
def test_errors_of_the_model_name_its_options(make: Callable[[], ModelConfig], named: str) -> None:
    """The names are put together as the error is raised, so that the texts alone do not show them."""
    with pytest.raises(UserError) as raised:
        make()
    assert named in groups_of(str(raised.value))
    assert groups_of(str(raised.value)) <= every_option()
