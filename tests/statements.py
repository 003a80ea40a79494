"""What the tests of statements share: figures as pages write them, and what the configs hold."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import yaml
from conftest import REPOSITORY

from mmrec.core.options import shipped_configs
from mmrec.model import ModelConfig, RecurrentLM

CONFIGS = shipped_configs()
VOCABULARY = {"quickstart": 65, "tiny": 65, "mini": 65, "portable-tiny": 65}
LARGE = 50_257
"""Vocabularies that the configs' sizes are said for: Tiny Shakespeare's characters, GPT-2's tokens for the larger."""


def page(name: str) -> str:
    """Return a page's text, its line breaks inside paragraphs made spaces."""
    return re.sub(r"(?<=\S)\n(?=[^\s|#])", " ", (REPOSITORY / name).read_text(encoding="utf-8"))


def find(pattern: str, name: str) -> re.Match[str]:
    """Return the one place of the page ``name`` that ``pattern`` describes."""
    text = page(name)
    found = list(re.finditer(pattern, text))
    assert len(found) == 1, f"{name}: {pattern!r} is there {len(found)} times"
    return found[0]


def number(written: str, page: str = "README.md") -> float:
    """Return the number that a page writes: 1,517,984 in English is 1.517.984 in Turkish."""
    thousands, point = (".", ",") if page == "README.tr.md" else (",", ".")
    return float(written.replace(thousands, "").replace(point, "."))


def same(written: str, value: float, page: str = "README.md") -> bool:
    """Return whether ``value`` is ``written``, rounded to as many digits: 17,448 is 17,400, and is not 17,500."""
    digits = f"{written}".replace("." if page == "README.tr.md" else ",", "").replace(",", ".")
    _, point, decimals = digits.partition(".")
    unit = 10.0 ** (-len(decimals) if point else len(digits) - len(digits.rstrip("0")))
    return abs(float(digits) - value) <= unit * (0.5 + 1e-9)


def content(config: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CONFIGS[config].read_text(encoding="utf-8"))
    return loaded


@cache
def model(config: str, vocab_size: int) -> RecurrentLM:
    with torch.device("meta"):
        return RecurrentLM(ModelConfig(**content(config)["model"]["config"]), vocab_size)
