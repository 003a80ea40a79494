"""Recipes of the synthetic tasks: "small" on two cores in minutes, "full" as published, for larger machines."""

from __future__ import annotations

from mmrec.evals.tasks import MQAR, S5, Copy, Induction, KeyValue, Parity, Passkey
from mmrec.evals.training import Recipe
from mmrec.model import ModelConfig


def _config(dim: int, heads: int, *layer_types: str) -> ModelConfig:
    """Return two layers with a narrow feed-forward network: these tasks need state, not knowledge."""
    return ModelConfig(dim=dim, layers=2, layer_types=layer_types, heads=heads, ffn_dim=dim)


BOTH = _config(64, 2, "short", "long")
"""A short layer below a long one: with two long ones passkeys are lost on the way."""
LONG = _config(64, 2, "long")

SMALL: dict[str, Recipe] = {
    # One head: 4 heads would each hold a matrix of 32 x 32, too small for 128 pairs.
    "mqar": Recipe(MQAR, _config(128, 1, "long"), (4, 8, 16, 32, 64, 128), (4, 16, 64, 128), 500),
    "passkey": Recipe(Passkey, BOTH, (64, 256, 1024, 4096), (1024, 4096, 16384, 65536), 600),
    "kv": Recipe(KeyValue, BOTH, (16, 32, 64), (64, 128, 256), 300),
    # One head, as for mqar: what is overwritten depends on the directions that the keys can have.
    "copy": Recipe(Copy, _config(128, 1, "short", "long"), (8, 16, 32, 64, 96), (64, 96, 128, 256), 400),
    "induction": Recipe(Induction, BOTH, (64, 128, 256), (256, 4096, 65536), 300),
    "parity": Recipe(Parity, LONG, (4, 8, 16, 32, 64), (64, 256, 1024), 400, tokens=4096),
    "s5": Recipe(S5, LONG, (4, 8, 16, 32, 64), (16, 64, 256), 2000, tokens=4096),
}
PAIRS = (4, 8, 16, 32, 64, 128, 256)
FULL: dict[str, Recipe] = {
    # 1.3 billion tokens, as many as one run of zoology's sweep reads: 64 epochs of 100,000 rows of 256 are 1.6.
    "mqar": Recipe(MQAR, _config(128, 1, "long"), PAIRS, (4, 16, 64, 128, 256), 20_000, tokens=65_536),
    "passkey": Recipe(Passkey, BOTH, (64, 256, 1024, 4096), (1024, 4096, 16384, 65536), 5000, tokens=65_536),
}
