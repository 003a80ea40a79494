"""Matrix products of tiles of bfloat16, by the tile units of a processor or its vectors, in buffers made once."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p
from functools import cache

import torch
from torch import Tensor

from mmrec.model.ops.native.build import library
from mmrec.model.ops.native.functions import Whole, prepared

BLOCK = 32
"""Rows and columns of what is packed are multiples of this, as tiles.h has it."""


@cache
def has_tiles() -> bool:
    """Return whether the kernels are built, and this processor multiplies bfloat16: by tile units, or by vectors."""
    kernels = library(torch.bfloat16)
    return kernels is not None and bool(kernels.tiles_supported())


class PackedWeight:
    """A weight in the order that products read it in, forwards and backwards.

    Args:
        weight: [outputs, inputs], float32, contiguous.

    Attributes:
        pack: takes over what is in the weight now.
    """

    def __init__(self, weight: Tensor) -> None:
        self._outputs, self._inputs = weight.shape
        room = _padded(self._outputs) * _padded(self._inputs)
        self._forwards, self._backwards = torch.zeros(2, room, dtype=torch.bfloat16)
        sizes = self._outputs, self._inputs
        self.pack = prepared("pack_weight", torch.bfloat16, *sizes, weight, self._forwards, self._backwards)
        self.pack()

    def product(self, x: Tensor, y: Tensor) -> Callable[[], None]:
        """Return what writes ``x`` [P, inputs] times the transposed weight to ``y`` [P, outputs]; both bfloat16."""
        return self._prepared(self._inputs, self._outputs, x, self._forwards, y)

    def product_backwards(self, to_y: Tensor, to_x: Tensor) -> Callable[[], None]:
        """Return what writes ``to_y`` [P, outputs] times the weight to ``to_x`` [P, inputs]; both bfloat16."""
        return self._prepared(self._outputs, self._inputs, to_y, self._backwards, to_x)

    @staticmethod
    def _prepared(inner: int, columns: int, x: Tensor, right: Tensor, y: Tensor) -> Callable[[], None]:
        given = len(x), inner, columns, *_rows(x, inner), right, *_rows(y, columns)
        return prepared("tile_product", torch.bfloat16, *given)


def weight_gradient(to_y: Tensor, x: Tensor, to_weight: c_void_p) -> Callable[[], None]:
    """Return what writes the gradient of a weight.

    Args:
        to_y: [P, outputs], bfloat16.
        x: [P, inputs], bfloat16.
        to_weight: address of [outputs, inputs], contiguous, float32: the transposed ``to_y`` times ``x``.
    """
    outputs, inputs = to_y.shape[1], x.shape[1]
    given = len(x), outputs, inputs, *_rows(to_y, outputs), *_rows(x, inputs), to_weight
    return prepared("tile_weight_gradient", torch.bfloat16, *given)


def _rows(x: Tensor, columns: int) -> tuple[Whole, int]:
    """Return what tells a kernel where the rows of ``x`` [P, columns] begin: they may be parts of longer ones."""
    if x.dtype != torch.bfloat16 or x.shape[1] != columns or x.stride(1) != 1:
        raise ValueError(f"a product takes rows of {columns} numbers in bfloat16, not {list(x.shape)} in {x.dtype}")
    return Whole(x), x.stride(0)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
