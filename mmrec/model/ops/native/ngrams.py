"""Counts of n-grams and their mixture with models by compiled code; the plain forms are in :mod:`mmrec.inference`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec.model.ops.native.build import LEARNING
from mmrec.model.ops.native.functions import prepared

MOST_TOKENS, MOST_ORDERS = 4096, 8
"""Of a vocabulary, and of lengths of contexts: ngrams.h has room for so many."""


class NgramMixing(Structure):
    """How the mixture's weights move: what a part leaves of the curvature, and what that is at least."""

    _fields_ = [("forgetting", c_double), ("damping", c_double)]


class _Ngrams(Structure):
    _fields_ = [
        ("table", c_void_p),
        *((name, c_int64) for name in ("vocab", "orders")),
        *((name, c_void_p) for name in ("lengths", "factors", "salts", "begins", "spans")),
    ]


class Hashing(NamedTuple):
    """Where contexts lie in a table.

    Attributes:
        lengths: of the contexts of each of the K orders, from short to long.
        factors: of the tokens before, the last one first, [the longest length], uint64.
        salts: of each order, [K], uint64.
        begins: first slot of each order, [K], uint64.
        spans: number of slots that its contexts begin in, [K], uint64.
    """

    lengths: Sequence[int]
    factors: np.ndarray
    salts: np.ndarray
    begins: np.ndarray
    spans: np.ndarray

    def takes(self, vocab_size: int) -> bool:
        """Whether the compiled code has room for as many tokens and orders."""
        return vocab_size <= MOST_TOKENS and len(self.lengths) <= MOST_ORDERS


class CompiledNgrams:
    """The compiled form of a table of :class:`mmrec.inference.ngram_cache.NgramCache`, and of what is done with it.

    Args:
        table: [S], uint16, the one that is read and changed.
        vocab_size: N, of the tokens.
        hashing: where contexts lie in it.
    """

    def __init__(self, table: np.ndarray, vocab_size: int, hashing: Hashing) -> None:
        numbers = (hashing.factors, hashing.salts, hashing.begins, hashing.spans)
        arrays = [np.array(hashing.lengths, dtype=np.int64), *(np.ascontiguousarray(each) for each in numbers)]
        self._kept = table, arrays
        addresses = [each.ctypes.data for each in arrays]
        self._ngrams = _Ngrams(table.ctypes.data, vocab_size, len(hashing.lengths), *addresses)

    def counts(self, history: Tensor, tokens: Tensor) -> Tensor:
        """Return the counts [K, T + 1, N], float32, after ``history`` [longest length] and ``tokens`` [T], int64."""
        found = torch.zeros(self._ngrams.orders, len(tokens) + 1, self._ngrams.vocab)
        self._run("look_up_ngrams", len(tokens), history, tokens, found)
        return found

    def count(self, history: Tensor, tokens: Tensor) -> None:
        """Count ``tokens`` after ``history``."""
        self._run("count_ngrams", len(tokens), history, tokens)

    def mix(
        self,
        rule: NgramMixing,
        before: tuple[Tensor, Tensor],
        logits: tuple[Tensor, Tensor],
        weights: Tensor,
        curvature: Tensor,
        learned_from: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a part's predictions by two models and by the counts.

        Args:
            rule: of the weights.
            before: the history and the tokens of the part, as above.
            logits: [T, N] of each model, float32, that predict the part's tokens.
            weights: [K + 1, M], float64, M = K + 2.
            curvature: [K + 1, M, M], float64.
            learned_from: from which token on they say what the weights are to be after the part.

        Returns:
            The log-probabilities [T, N], the weights and the curvature after the part.
        """
        history, tokens = before
        first, second = logits
        mixture, weights, curvature = torch.empty_like(first), weights.clone(), curvature.clone()
        numbers = len(tokens), learned_from
        self._run("mix_ngrams", rule, *numbers, history, tokens, first, second, weights, curvature, mixture)
        return mixture, weights, curvature

    def _run(self, name: str, *arguments: Structure | Tensor | int) -> None:
        prepared(name, LEARNING, self._ngrams, *arguments)()
