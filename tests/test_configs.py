"""Every shipped config is parsed; those that fit are stepped once; the others are counted without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from helpers import checkpoints, last

from mmrec.checkpoints.loading import load_model
from mmrec.core.options import find_config, shipped_configs
from mmrec.data.store import open_tokens
from mmrec.model import ModelConfig, RecurrentLM

CONFIGS = shipped_configs()


def config_of(name: str) -> ModelConfig:
    content: dict[str, Any] = yaml.safe_load(CONFIGS[name].read_text())
    return ModelConfig(**content["model"]["config"])


def count(name: str, vocab_size: int) -> int:
    with torch.device("meta"):
        return RecurrentLM(config_of(name), vocab_size).parameter_count()


@pytest.mark.parametrize(
    ("name", "vocab_size", "least", "most"),
    [
        ("tiny", 65, 1.5e6, 2e6),
        ("quickstart", 65, 0.5e6, 0.85e6),
        ("mini", 65, 9e6, 12e6),
        ("portable-tiny", 65, 1.5e6, 2e6),
        ("portable-small", 50_257, 110e6, 140e6),
        ("small", 50_257, 110e6, 140e6),
        ("base", 50_257, 330e6, 400e6),
        ("1b", 50_257, 1.0e9, 1.5e9),
        ("7b", 50_257, 6.3e9, 7.5e9),
    ],
)
def test_parameter_counts(name: str, vocab_size: int, least: float, most: float) -> None:
    assert least <= count(name, vocab_size) <= most


def assert_holds(found: Any, given: Any) -> None:
    """Assert that ``found`` is ``given``, its dicts with defaults added."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert_holds(found[key], value)
    elif isinstance(given, list):
        for one, other in zip(found, given, strict=True):
            assert_holds(one, other)
    else:
        assert found == given


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_parsed(name: str, mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("fit", "--config", name, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(CONFIGS[name].read_text())
    for group, values in given.items():
        if isinstance(values, dict):
            assert_holds(shown[group], values)


def assert_was_stepped(name: str, prepared: Path) -> None:
    """Assert that the run "a" has made one update of the config's model, to finite weights."""
    checkpoint = last("a")
    assert checkpoint["global_step"] == 1
    trained = load_model(checkpoints("a") / "last.ckpt")
    assert trained.net.parameter_count() == count(name, open_tokens(prepared).tokenizer.vocab_size)
    assert all(value.isfinite().all() for value in trained.net.state_dict().values())


@pytest.mark.parametrize("name", ["tiny", "quickstart", "mini", "portable-tiny"])
def test_what_fits_is_stepped(name: str, mmrec: Command, prepared: Path) -> None:
    short = ["--data.seq_len=32", "--data.batch_size=2", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--run=a", "--config=trainer/cpu"]
    assert mmrec("fit", "--config", name, f"--data.data_dir={prepared}", *short, *quiet) == 0
    assert_was_stepped(name, prepared)


@pytest.mark.slow
def test_small_is_stepped(mmrec: Command, prepared: Path) -> None:
    short = ["--data.seq_len=16", "--data.batch_size=1", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    short.append("--best.save_top_k=0")  # one checkpoint of a gigabyte is enough
    quiet = ["--trainer.enable_progress_bar=false", "--run=a", "--config=trainer/cpu"]
    assert mmrec("fit", "--config=small", f"--data.data_dir={prepared}", *short, *quiet) == 0
    assert_was_stepped("small", prepared)


def test_configs_stack(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    stacked = ["-c", "small", "-c", "trainer/fsdp", "-c", "corpus/sample", "--data.batch_size=3"]
    assert mmrec("fit", *stacked, "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["config"]["dim"] == 768
    assert shown["model"]["optimizer"] == "muon"
    assert (shown["trainer"]["strategy"], shown["trainer"]["precision"]) == ("sharded", None)
    assert shown["trainer"]["strategy"] == "sharded"
    assert shown["data"]["corpus"] == "sample"
    assert shown["data"]["batch_size"] == 3


def test_configs_are_found_by_name_and_by_path() -> None:
    assert {find_config(name).resolve() for name in ("tiny", "tiny.yaml", "configs/tiny.yaml")} == {CONFIGS["tiny"]}
    assert find_config("trainer/ddp").name == "ddp.yaml"


def test_the_small_models_are_those_that_the_readme_speaks_of() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{count('tiny', 65):,}" in readme
    assert f"{count('quickstart', 65):,}" in readme
