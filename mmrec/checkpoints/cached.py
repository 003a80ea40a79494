"""What a memory file keeps of the n-grams that were read: their counts, and how much they are to be believed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmrec.checkpoints.learned import PART
from mmrec.core.errors import UserError
from mmrec.model import State, state_to

ORDERS = (2, 3, 4, 6, 8, 12, 20)
"""Lengths of the contexts after which tokens are counted."""
HISTORY = max(ORDERS)
NO_TOKEN = -1
"""Stands for what was before a text."""
MODELS = 2
"""Whose predictions are mixed with those of the counts: what the model has learned, and the untouched model."""
DAMPING = 20.0
"""Of Newton's method: the curvature at first, and at least."""
LARGEST_TABLE = 4096
"""Of the sizes that a table may have, in MiB."""
LARGEST_VOCABULARY = 4096
"""Of a model whose tokens can be counted: after each context, all of them are looked up."""
LARGEST_WEIGHT = 1e3
"""Of a weight in the mixture; reading keeps far below it."""


@dataclass(frozen=True)
class CachedNgrams:
    """The n-grams that were read, and the weights of what they predict.

    Both change between parts of a text alone, as learned weights do; the tokens of a part that has not ended are kept
    and are read once more with the rest of it.

    Attributes:
        table: [S], int16, the slots of :class:`mmrec.inference.ngram_cache.NgramCache`. What reads on from a memory
            copies it, and changes the copy.
        history: [HISTORY], int64, the last tokens before the part; :data:`NO_TOKEN` before a text.
        tokens: [n], int64: those of the part that were read.
        weights: [S, M], float64, of the M members of the mixture, in S sets.
        curvature: [S, M, M], float64: second derivatives of the loss by the weights, of what was read lately.
        begin: the model's state after the last whole part, and the logits [N] of the token after it; None where
            learned weights keep those of their own.
    """

    table: Tensor
    history: Tensor
    tokens: Tensor
    weights: Tensor
    curvature: Tensor
    begin: tuple[State, Tensor] | None = None

    @classmethod
    def empty(cls, megabytes: int, begin: tuple[State, Tensor] | None = None) -> CachedNgrams:
        """Return a cache that has read nothing, with a table of so many MiB; UserError where that is out of range."""
        if not 1 <= megabytes <= LARGEST_TABLE:
            raise UserError(f"cache is {megabytes!r}; it must be 1 to {LARGEST_TABLE:,} MiB")
        sets, members = len(ORDERS) + 1, MODELS + len(ORDERS)
        weights = torch.zeros(sets, members, dtype=torch.float64)
        weights[:, 0] = 1
        weights[:, MODELS:] = 0.5
        return cls(
            table=torch.zeros(megabytes << 19, dtype=torch.int16),
            history=torch.full((HISTORY,), NO_TOKEN),
            tokens=torch.zeros(0, dtype=torch.int64),
            weights=weights,
            curvature=DAMPING * torch.eye(members, dtype=torch.float64).repeat(sets, 1, 1),
            begin=begin,
        )

    def to(self, device: torch.device) -> CachedNgrams:
        """Return the same with what the model goes on from on ``device``; the counts stay on the CPU."""
        if self.begin is None:
            return self
        state, logits = self.begin
        return replace(self, begin=(state_to(state, device), logits.to(device)))

    @property
    def megabytes(self) -> int:
        """Size of the table, in MiB."""
        return len(self.table) >> 19

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers by their names in the file."""
        tensors = {
            "cache.table": self.table,
            "cache.history": self.history.to(torch.int32),
            "cache.tokens": self.tokens.to(torch.int32),
            "cache.weights": self.weights,
            "cache.curvature": self.curvature,
        }
        if self.begin is not None:
            tensors["cache.logits"] = self.begin[1]
            for number, (past, memory) in enumerate(self.begin[0]):
                tensors |= {f"cache.state.{number}.past": past, f"cache.state.{number}.memory": memory}
        return tensors

    def metadata(self) -> dict[str, str]:
        """Return what the file says of them beside the numbers."""
        return {"part": str(PART), "cache": str(self.megabytes)}

    @classmethod
    def from_file(cls, vocab_size: int, tensors: dict[str, Tensor]) -> CachedNgrams:
        """Return what :meth:`tensors` gave; the caller has checked shapes and dtypes.

        Raises:
            UserError: a number is none that reading ever makes.
        """
        history, tokens = tensors["cache.history"].to(torch.int64), tensors["cache.tokens"].to(torch.int64)
        if tokens.dim() != 1 or len(tokens) >= PART:
            raise UserError("holds more tokens than a part has")
        if (history < NO_TOKEN).any() or (tokens < 0).any() or (torch.cat([history, tokens]) >= vocab_size).any():
            raise UserError("holds tokens that the model does not have")
        weights, curvature = tensors["cache.weights"], tensors["cache.curvature"]
        if (weights.abs() > LARGEST_WEIGHT).any() or not torch.allclose(curvature, curvature.mT):
            raise UserError("holds weights that reading never makes")
        if (torch.linalg.eigvalsh(curvature) < DAMPING / 2).any():
            raise UserError("holds weights that reading never makes")
        begin = None
        if "cache.logits" in tensors:
            layers = range(sum(name.startswith("cache.state.") for name in tensors) // 2)
            state = [(tensors[f"cache.state.{n}.past"], tensors[f"cache.state.{n}.memory"]) for n in layers]
            begin = state, tensors["cache.logits"]
        return cls(tensors["cache.table"], history, tokens, weights, curvature, begin)


def megabytes_of(metadata: dict[str, str]) -> int:
    """Return the size of the table that the metadata of a file give; UserError where it is none."""
    size = metadata.get("cache", "")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", size) or int(size) > LARGEST_TABLE:
        raise UserError("does not say how large its cache is")
    return int(size)
