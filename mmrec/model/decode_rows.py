"""Rows of numbers, one a text, and what decoding computes of them: the same bits however many rows there are.

Libraries choose the order in which they add by the shape of what they are given. So each row is multiplied by a
matrix, and summed, by a call of its own; the matrix is in the cache then. All else is done for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrec.model.layers import RMSNorm

LINE = 16
"""Numbers of float32 in a line of the cache."""


def buffer(rows: int, width: int) -> Tensor:
    """Return zeros [rows, width].

    Rows begin at lines of the cache, and lie apart. So an operation of torch goes along each of them by itself: the
    numbers at the end of what it goes along it computes one by one, by another function than those before.
    """
    return torch.zeros(rows, (width // LINE + 1) * LINE)[:, :width]


def as_rows(x: Tensor) -> np.ndarray:
    """Return ``x`` [B, ...] in the same memory, of a single row without the first dimension.

    numpy goes along one dimension in half the time that it takes for two.
    """
    found: np.ndarray = (x[0] if len(x) == 1 else x).numpy()
    return found


def product(weight: Tensor, x: Tensor, out: Tensor, adds: bool = False) -> Callable[[], object]:
    """Return what multiplies a matrix by vectors.

    Args:
        weight: the matrix, [N, K].
        x: the vectors, [B, K], of :func:`buffer`.
        out: for the results [B, N], another.
        adds: to what is in ``out``, in the place of overwriting it.
    """
    rows = zip(x, out, strict=True)
    if adds:
        calls = [partial(y.addmv_, weight, row) for row, y in rows]
    else:
        calls = [partial(torch.mv, weight, row, out=y) for row, y in rows]

    def multiply() -> None:
        for call in calls:
            call()

    return calls[0] if len(calls) == 1 else multiply


class NormStep:
    """RMS normalization of the residual stream.

    Args:
        norm: the module.
        x: the stream, [B, D], of :func:`buffer`.

    Attributes:
        normal: [B, D], where the result goes.
    """

    def __init__(self, norm: nn.Module, x: Tensor) -> None:
        assert isinstance(norm, RMSNorm)
        size = x.shape[1]
        self.normal = buffer(len(x), size)
        self.stream, self.out = as_rows(x), as_rows(self.normal)
        # Of the sum of squares instead of their mean, which takes longer to compute.
        self.weight = (norm.weight.detach() * size**0.5).numpy()
        self.scale = inverse_lengths(self.stream, RMSNorm.EPSILON * size)

    def __call__(self) -> None:
        np.multiply(self.stream, self.weight, out=self.out)
        np.multiply(self.out, self.scale(), out=self.out)


def inverse_lengths(vectors: np.ndarray, epsilon: float) -> Callable[[], Any]:
    """Return what computes, from what is in ``vectors`` [..., S] then, 1 / sqrt(length^2 + epsilon), [..., 1].

    Of a single vector it is a number of Python's, in a third of the time, and to the same bit: square roots and
    quotients of float64 are exact in both.
    """
    if vectors.ndim == 1:
        return lambda: 1 / math.sqrt(float(vectors.dot(vectors)) + epsilon)
    rows, columns, squares = _square_of(vectors)
    roots, inverse = np.empty(squares.shape[:-1]), squares[..., 0]

    def compute() -> np.ndarray:
        np.matmul(rows, columns, out=squares)
        np.add(inverse, epsilon, out=roots, dtype=np.float64)
        np.sqrt(roots, out=roots)
        np.divide(1, roots, out=inverse, casting="same_kind")
        return inverse

    return compute


def lengths(vectors: np.ndarray, epsilon: float) -> Callable[[], np.ndarray]:
    """Return what computes sqrt(length^2 + epsilon), [..., 1], of several vectors in any case, in float32."""
    rows, columns, squares = _square_of(vectors)
    found, added = squares[..., 0], np.full_like(squares[..., 0], epsilon)

    def compute() -> np.ndarray:
        np.matmul(rows, columns, out=squares)
        np.add(found, added, out=found)
        np.sqrt(found, out=found)
        return found

    return compute


def _square_of(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return two views of ``vectors`` [..., S], whose product is their squared lengths, and where that goes."""
    squares = np.empty((*vectors.shape[:-1], 1, 1), dtype=np.float32)
    return vectors[..., None, :], vectors[..., None], squares


class ConvolutionWindow:
    """The last C inputs of a causal convolution: a window that moves on over memory, and then back to its begin.

    So it adds in the order of the tokens, wherever it is.

    Args:
        weight: [channels, C].
        rows: number of texts, B.

    Attributes:
        sum: [B, channels], the outputs of the last call.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        channels, width = weight.shape
        self.taps = weight.detach().T.contiguous().numpy()
        self.ones = np.ones((1, width), dtype=np.float32)
        moves = 2 * width
        self.seen = torch.zeros(rows, moves + width - 1, channels)
        seen = as_rows(self.seen)
        self.windows = [seen[..., first : first + width, :] for first in range(moves)]
        self.places = [window[..., -1, :] for window in self.windows]
        self.begin, self.end = seen[..., : width - 1, :], seen[..., moves:, :]
        self.next = 0
        self.products = np.empty_like(self.windows[0])
        self.sum = buffer(rows, channels)
        self.out = as_rows(self.sum[:, None])

    def __call__(self, x: np.ndarray) -> None:
        """Read ``x`` [B, channels]."""
        if self.next == len(self.windows):
            np.copyto(self.begin, self.end)
            self.next = 0
        np.copyto(self.places[self.next], x)
        np.multiply(self.windows[self.next], self.taps, out=self.products)
        np.matmul(self.ones, self.products, out=self.out)
        self.next += 1

    def set_past(self, past: Tensor) -> None:
        """Go on from ``past``, the last C - 1 inputs, [B, C - 1, channels]."""
        self.next = 0
        self.seen[:, : past.shape[1]] = past

    def past(self) -> Tensor:
        """Return the last C - 1 inputs, [B, C - 1, channels]."""
        return self.seen[:, self.next : self.next + self.begin.shape[-2]]
