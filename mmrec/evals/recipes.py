"""How each task is taught and tested: "small" on two cores in minutes, "full" as published, for larger machines."""

from __future__ import annotations

from mmrec.evals.tasks import MQAR, S5, Copy, Induction, KeyValue, Parity, Passkey
from mmrec.evals.training import Recipe
from mmrec.model import Shape


def _long(dim: int, heads: int) -> Shape:
    """Return two layers of long memory, with a narrow feed-forward network: these tasks ask for recall."""
    return Shape(dim=dim, layers=2, memories=("long",), heads=heads, ffn_dim=dim)


SMALL: dict[str, Recipe] = {
    # 4 heads would each hold a matrix of 32 x 32, too small for 128 pairs.
    "mqar": Recipe(MQAR, _long(128, 1), (4, 8, 16, 32, 64, 128), (4, 16, 64, 128), 500),
    "passkey": Recipe(Passkey, _long(64, 2), (64, 256, 1024, 4096), (1024, 4096, 16384, 65536), 600),
    "kv": Recipe(KeyValue, _long(64, 2), (16, 32, 64), (64, 128, 256), 400),
    "copy": Recipe(Copy, _long(64, 2), (8, 16, 32, 64), (32, 64, 128), 600),
    "induction": Recipe(Induction, _long(64, 2), (64, 128, 256), (256, 4096, 65536), 400),
    "parity": Recipe(Parity, _long(64, 2), (4, 8, 16, 32, 64), (64, 256, 1024), 600, tokens=4096),
    "s5": Recipe(S5, _long(64, 2), (4, 8, 16, 32, 64), (16, 64, 256), 600, tokens=4096),
}
FULL: dict[str, Recipe] = {
    # zoology's sizes and beyond: 100,000 rows at each level, read as often as its sweep does.
    "mqar": Recipe(MQAR, _long(128, 1), (4, 8, 16, 32, 64, 128, 256), (4, 16, 64, 128, 256), 20_000, tokens=65_536),
    "passkey": Recipe(Passkey, _long(128, 2), (64, 256, 1024, 4096), (1024, 4096, 16384, 65536), 5000, tokens=65_536),
}
