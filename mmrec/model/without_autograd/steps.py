"""The steps that are not recurrent: products, norms, the end of a branch with its dropout, SwiGLU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mmrec.model.layers import FeedForward, RMSNorm
from mmrec.model.ops.native.functions import prepared
from mmrec.model.ops.native.products import has_tiles, weight_gradient
from mmrec.model.without_autograd.buffers import Room


class Product:
    """A linear map: y [P, outputs] of x [P, inputs]; the gradient of its weight is of their dtype."""

    def __init__(self, room: Room, weight: Tensor, x: Tensor, y: Tensor) -> None:
        self._weight = room.weight(weight, x.dtype)
        self._turned = self._weight.t()
        self._x, self._y, self._grad = x, y, room.gradient(weight)

    def forward(self) -> None:
        torch.mm(self._x, self._turned, out=self._y)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """Write ``x`` plus y to ``out``, both [P, outputs]."""
        torch.addmm(x, self._x, self._turned, out=out)

    def backward(self, to_y: Tensor, to_x: Tensor) -> None:
        if self._grad is not None:
            torch.mm(to_y.t(), self._x, out=self._grad)
        torch.mm(to_y, self._weight, out=to_x)


class TileProduct:
    """:class:`Product` in bfloat16 by products of tiles; the gradient of its weight is float32."""

    def __init__(self, room: Room, weight: Tensor, x: Tensor, y: Tensor) -> None:
        self._weight, self._x = room.packed(weight), x
        self.forward = self._weight.product(x, y)
        self._to_weight = None if room.gradient(weight) is None else room.address(weight)
        # By the addresses of the buffers, which are the same at every pass.
        self._backward: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def backward(self, to_y: Tensor, to_x: Tensor) -> None:
        key = to_y.data_ptr(), to_x.data_ptr()
        if key not in self._backward:
            to_weight = [] if self._to_weight is None else [weight_gradient(to_y, self._x, self._to_weight)]
            self._backward[key] = [*to_weight, self._weight.product_backwards(to_y, to_x)]
        for each in self._backward[key]:
            each()


def uses_tiles(dtype: torch.dtype) -> bool:
    """Return whether products of ``dtype`` are those of tiles: the gradients of weights are float32 then."""
    return dtype == torch.bfloat16 and has_tiles()


def product(room: Room, weight: Tensor, x: Tensor, y: Tensor) -> Product | TileProduct:
    """Return the linear map by ``weight`` [outputs, inputs] from ``x`` [P, inputs] to ``y`` [P, outputs]."""
    return (TileProduct if uses_tiles(x.dtype) else Product)(room, weight, x, y)


class Norm:
    """RMS norm of x [P, D] into y; ``to_y`` is where its gradient is expected."""

    def __init__(self, room: Room, norm: RMSNorm, x: Tensor) -> None:
        places, dim = x.shape
        weight = norm.weight.detach()
        dtype = room.dtype if norm.feeds_product else torch.float32
        self.y, scale = room.kept(dim, dtype), torch.zeros(places)
        self.to_y = room.passing("to_y of a norm", dim, dtype)
        self.forward = prepared("rms_norm", dtype, places, dim, norm.EPSILON, x, weight, self.y, scale)
        no_gradient = room.gradient(norm.weight) is None
        to_weight = torch.zeros_like(weight) if no_gradient else room.address(norm.weight)
        given = x, weight, scale, self.to_y, 1, room.to_x, to_weight
        #: Adds the gradient of x to that of the stream.
        self.backward = prepared("rms_norm_backward", dtype, places, dim, *given)


class _BranchEnd:
    """The last map of a branch, whose result is added to the stream x, less what dropout leaves out."""

    def __init__(self, room: Room, weight: Tensor, inner: Tensor, x: Tensor, after: Tensor) -> None:
        self._x, self._after = x, after
        y, self._to_y = room.passing("y", x.shape[1]), room.passing("to_y", x.shape[1])
        self._product, self._y = product(room, weight, inner, y), y
        self._is_plain = room.dtype == torch.float32 and not room.dropout
        self._seeds = torch.zeros(room.rows, dtype=torch.int64) if room.dropout else None
        self._add: list[Callable[[], None]] = []
        self._drop_backward: list[Callable[[], None]] = []
        form = x[: room.length].numel(), int(room.dropout * (1 << 32)), 1 / (1 - room.dropout)
        streams = [room.by_rows(each) for each in (x, y, after, room.to_x, self._to_y)]
        for row in range(0 if self._is_plain else room.rows):
            one_x, one_y, one_after, to_x, to_y = (each[row] for each in streams)
            seed = torch.zeros(1, dtype=torch.int64) if self._seeds is None else self._seeds[row : row + 1]
            self._add.append(prepared("dropout_add", room.dtype, *form, seed, one_x, one_y, one_after))
            if self._seeds is not None:
                self._drop_backward.append(prepared("dropout_add_backward", room.dtype, *form, seed, to_x, to_y))

    def forward(self) -> None:
        if self._is_plain:
            assert isinstance(self._product, Product)
            self._product.add_to(self._x, self._after)
            return
        self._product.forward()
        if self._seeds is not None:
            torch.randint(1 << 32, self._seeds.shape, out=self._seeds)
        for row in self._add:
            row()

    def backward(self, to_stream: Tensor, to_inner: Tensor) -> None:
        to_y = to_stream if self._is_plain else self._to_y
        if not self._is_plain and self._seeds is None:
            to_y.copy_(to_stream)
        for row in self._drop_backward:
            row()
        self._product.backward(to_y, to_inner)


class Step(ABC):
    """A branch of the residual stream x [P, D]: what it adds, and :attr:`after`, the stream behind it."""

    def __init__(self, room: Room, norm: RMSNorm, x: Tensor, output: Tensor, inner: int) -> None:
        self.norm, self.after = Norm(room, norm, x), room.kept(x.shape[1], torch.float32)
        self.inner, self.to_inner = room.kept(inner), room.passing("of a map", inner)
        self.end = _BranchEnd(room, output, self.inner, x, self.after)
        self.to_x = room.to_x

    def forward(self) -> None:
        self.norm.forward()
        self.compute()
        self.end.forward()

    def backward(self) -> None:
        """Bring the gradient of the stream from behind the branch to before it."""
        self.end.backward(self.to_x, self.to_inner)
        self.compute_backward()
        self.norm.backward()

    @abstractmethod
    def compute(self) -> None:
        """Write what the last map reads, :attr:`inner`."""

    @abstractmethod
    def compute_backward(self) -> None:
        """Bring the gradient of :attr:`inner`, :attr:`to_inner`, to what the norm wrote."""


class FeedForwardStep(Step):
    """SwiGLU between two maps."""

    def __init__(self, room: Room, ffn: FeedForward, norm: RMSNorm, x: Tensor) -> None:
        inner = ffn.output.in_features
        super().__init__(room, norm, x, ffn.output.weight, inner)
        projected, self._to_projected = room.kept(2 * inner), room.passing("to a map", 2 * inner)
        self._project = product(room, ffn.project.weight, self.norm.y, projected)
        sizes = len(x), inner
        self._gate = prepared("swiglu", room.dtype, *sizes, projected, self.inner)
        self._gate_backward = prepared(
            "swiglu_backward", room.dtype, *sizes, projected, self.to_inner, self._to_projected
        )

    def compute(self) -> None:
        self._project.forward()
        self._gate()

    def compute_backward(self) -> None:
        self._gate_backward()
        self._project.backward(self._to_projected, self.norm.to_y)
