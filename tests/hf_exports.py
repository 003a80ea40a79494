"""An export of a model as transformers loads it, and how tests call it."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.tokenizers import ByteTokenizer

PROMPTS = ["the the the, then", "ere", "Iğdır", "and"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the library copies of an export's code in the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def exported(trained: LoadedModel, folder: Path) -> tuple[Any, Any]:
    """Return the model and the tokenizer as transformers loads them from an export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmrec.export import hf

    hf.save(folder, trained)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def exports(tmp_path: Path) -> tuple[LoadedModel, Any, Any]:
    trained = made(ByteTokenizer())
    return trained, *exported(trained, tmp_path / "out")


@pytest.fixture
def model(exports: tuple[LoadedModel, Any, Any]) -> Any:
    return exports[1]


@pytest.fixture
def fast(exports: tuple[LoadedModel, Any, Any]) -> Any:
    return exports[2]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids_of(fast: Any, text: str) -> Tensor:
    ids: Tensor = fast(text, return_tensors="pt").input_ids
    return ids


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def greedy(model: Any, *args: Any, **options: Any) -> Tensor:
    written: Tensor = model.generate(*args, max_new_tokens=12, do_sample=False, **options)[:, -12:]
    return written
