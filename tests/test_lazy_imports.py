"""Modules that are run only when they are needed: transparent to whoever imports them, and fewer at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import Command
from fsspec.implementations.memory import MemoryFileSystem
from helpers import fit
from lightning.fabric.utilities import cloud_io

from mmrec.core.lazy_imports import import_lazily
from mmrec.model.ops.native import functions

PACKAGE = {
    "__init__.py": "from lazy_example.base import Base\nfrom lazy_example import costly\nMORE = costly.VALUE\n",
    "base.py": "class Base: ...\n",
    "costly.py": "VALUE = 3\n",
}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that imports a costly part of itself; forgotten at the end."""
    (tmp_path / "lazy_example").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "lazy_example" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lazy_example", "lazy_example.base", "lazy_example.costly"):
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.delitem(sys.modules, name)


def test_a_package_is_run_when_something_else_is_asked_of_it() -> None:
    assert import_lazily("lazy_example", {"Base": lambda: import_module("lazy_example.base").Base})
    found = import_module("lazy_example")
    base = found.Base
    assert "lazy_example.costly" not in sys.modules
    assert import_module("lazy_example.base").Base is base
    assert found.MORE == 3
    assert "lazy_example.costly" in sys.modules
    assert found.Base is base
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = found.nothing


def test_a_module_is_found_without_the_package_around_it() -> None:
    assert import_lazily("lazy_example.costly", {})
    assert "lazy_example" not in sys.modules
    assert import_module("lazy_example").MORE == 3


def test_a_package_is_run_before_a_module_inside_it_where_it_is_to_be_whole() -> None:
    assert import_lazily("lazy_example", {"Base": lambda: None}, whole=True)
    assert import_module("lazy_example").Base is None
    assert "lazy_example.costly" not in sys.modules
    costly = import_module("lazy_example.costly")
    found = import_module("lazy_example")
    assert found.MORE == 3
    assert found.costly is costly is sys.modules["lazy_example.costly"]  # run once, not again after the package
    assert costly.__spec__ is not None
    assert costly.__spec__.origin == costly.__file__
    assert found.Base is import_module("lazy_example.base").Base


def test_what_is_there_or_does_not_exist_stays_as_it_is() -> None:
    before = import_module("lazy_example")
    assert not import_lazily("lazy_example", {})
    assert sys.modules["lazy_example"] is before
    assert not import_lazily("lazy_example_that_is_not_there", {})
    assert not import_lazily("lazy_example.nothing", {})
    assert "lazy_example_that_is_not_there" not in sys.modules


PROGRAM = """
import sys
from mmrec.core.lazy_imports import put_off_metrics
put_off_metrics()
from lightning.pytorch import LightningModule
print([name for name in ("scipy", "transformers", "torchmetrics.functional") if name in sys.modules])
import torchmetrics
from torchmetrics.metric import Metric
assert torchmetrics.Metric is Metric and issubclass(torchmetrics.MeanMetric, Metric)
assert torchmetrics.functional is sys.modules["torchmetrics.functional"]
"""


def test_lightning_starts_without_what_only_other_metrics_need() -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr


COMPILING = """
import sys
from mmrec.core.runtime import configure
from mmrec.core.lazy_imports import put_off_compiler
configure()
put_off_compiler()
import torch
from lightning.pytorch import Trainer
from torch._dynamo import OptimizedModule

@torch.compiler.disable
def left_out(x):
    return x + 1

linear = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(linear.parameters())
linear(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert left_out(torch.ones(1)) == 2 and not isinstance(linear, OptimizedModule)
assert "torch._dynamo.eval_frame" not in sys.modules
graphs = []
def count(graph, inputs):
    graphs.append(len([node for node in graph.graph.nodes if node.op == "call_function"]))
    return graph
assert isinstance(torch.compile(linear, backend=count), OptimizedModule)
assert OptimizedModule is not torch._dynamo.OptimizedModule
assert torch.compile(lambda x: left_out(2 * x) * 3, backend=count)(torch.ones(1)) == 9
print(graphs)
"""


def test_the_compiler_is_there_once_something_is_compiled() -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ran = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, "[1, 1]\n"), ran.stderr  # what is left out is in no graph


def test_a_training_does_without_the_compiler(prepared: Path, tmp_path: Path) -> None:
    options = fit(prepared, "--trainer.max_epochs=-1", "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    cores = ["--trainer.devices=2", "--trainer.strategy=cores"]
    for more in [[], cores] if sys.platform == "linux" and functions.is_built() else [[]]:
        command = [sys.executable, "-X", "importtime", "-m", "mmrec", *options, *more]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "lightning.pytorch" in ran.stderr
        assert "torch._dynamo.eval_frame" not in ran.stderr, more


def test_a_help_is_printed_without_the_compiler() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mmrec", "fit", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0
    assert "--model.config.dim" in ran.stdout
    assert "lightning.pytorch" in ran.stderr
    assert "torch._dynamo.eval_frame" not in ran.stderr


def test_a_training_in_a_folder_asks_no_cloud_whose_it_is(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cloud_io, "module_available", asked.append)
    assert mmrec(*fit(prepared, "--trainer.max_steps=1", "--run=a")) == 0
    assert not asked
    assert not cloud_io._is_dir(MemoryFileSystem(), "/somewhere")
    assert {"s3fs", "gcsfs"} <= {*asked}
