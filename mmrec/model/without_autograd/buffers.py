"""The buffers of a pass: made once, and in the same memory for batches of other shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from mmrec.model.ops.native.products import PackedWeight

ROUND = 64
"""Buffers have room for rows of a multiple of so many tokens."""


class Room:
    """Makes the buffers of a pass.

    Args:
        shape: B and T.
        dim: D.
        gradients: by the identity of a parameter: where its gradient is written, of ``dtype`` where it is a matrix
            that products read, else float32. Parameters that have none here are not differentiated by.
        dtype: of matrix products.
        dropout: share of a branch's numbers that is left out.
        memory: what the buffers of other shapes are in, if they are not used at the same time; more is added to it.
        addresses: by the identity of a parameter: the address of its gradient, if that changes from pass to pass.

    Attributes:
        to_x: [P, D], the gradient of the residual stream, at the place where the pass backwards is.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int,
        gradients: dict[int, Tensor],
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        memory: list[Tensor] | None = None,
        addresses: dict[int, c_void_p] | None = None,
    ) -> None:
        self.rows, self.length = shape
        self._addresses = addresses
        self._memory: list[Tensor] = [] if memory is None else memory
        self._taken = 0
        self.dtype, self.dropout, self._gradients = dtype, dropout, gradients
        self._shared: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._narrow: dict[int, tuple[Tensor, Tensor]] = {}
        self._packed: list[PackedWeight] = []
        self._sums: list[tuple[Tensor, Tensor]] = []
        self.to_x = self.passing("to_x", dim, torch.float32)

    def kept(self, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer [P, size], of the products' dtype if no other is named, for what the gradients need."""
        return self.taken(self.rows * self.length, size, dtype=dtype or self.dtype)

    def taken(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a buffer, zero at first if no other pass uses it, for what is not larger than all tokens."""
        needed, place = math.prod(shape), self._taken
        self._taken += 1
        # As if rows were somewhat longer: those of another shape may be.
        room = -(-needed // self.length) * (-(-self.length // ROUND) * ROUND)
        if place == len(self._memory):
            self._memory.append(torch.zeros(room, dtype=dtype))
        elif self._memory[place].dtype != dtype or len(self._memory[place]) < needed:
            self._memory[place] = torch.zeros(room, dtype=dtype)
        return self._memory[place][:needed].view(shape)

    def passing(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer [P, size] that all of this name, size and dtype use, one after the other."""
        dtype = dtype or self.dtype
        key = name, size, dtype
        if key not in self._shared:
            self._shared[key] = self.kept(size, dtype)
        return self._shared[key]

    def by_rows(self, x: Tensor) -> Tensor:
        """Return ``x`` [P, ...] as [B, T, ...]."""
        return x.view(self.rows, self.length, *x.shape[1:])

    def weight(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``parameter`` in ``dtype``: itself, or a copy that :meth:`refresh` brings up to date."""
        original = parameter.detach()
        if dtype == original.dtype:
            return original
        return self._narrow.setdefault(id(parameter), (original.to(dtype), original))[0]

    def packed(self, parameter: Tensor) -> PackedWeight:
        """Return ``parameter`` as products read it; :meth:`refresh` brings what has a gradient up to date."""
        packed = PackedWeight(parameter.detach())
        if self.gradient(parameter) is not None:
            self._packed.append(packed)
        return packed

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return where the gradient of ``parameter`` is written, if it is."""
        return self._gradients.get(id(parameter))

    def address(self, parameter: Tensor) -> c_void_p:
        """Return the address of where the gradient of ``parameter``, which has one, is written at each pass."""
        if self._addresses is not None:
            return self._addresses[id(parameter)]
        return c_void_p(self._gradients[id(parameter)].data_ptr())

    def by_row(self, parameter: Tensor) -> Tensor:
        """Return a buffer [B, ...] for the gradient of ``parameter`` by each row, which :meth:`add_up` adds up."""
        found = self.gradient(parameter)
        if found is not None and self.rows == 1 and self._addresses is None:
            return found[None]
        buffer = torch.zeros(self.rows, *parameter.shape)
        if found is not None:
            self._sums.append((buffer, found))
        return buffer

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        if self._narrow:
            copies, originals = zip(*self._narrow.values(), strict=True)
            torch._foreach_copy_(list(copies), list(originals))
        for weight in self._packed:
            weight.pack()

    def add_up(self) -> None:
        """Write the gradients that are sums over rows."""
        for buffer, gradient in self._sums:
            torch.sum(buffer, 0, out=gradient)


class Gradients:
    """Memory for gradients, those of one dtype behind each other.

    Args:
        shapes: of the gradients.
        dtypes: of each.

    Attributes:
        parts: the gradients of the last pass, or of the one that is begun.
        addresses: of the parts, the same objects at every pass.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> None:
        self._shapes, self._dtypes = shapes, dtypes
        sizes = {kind: sum(s.numel() for s, of in zip(shapes, dtypes, strict=True) if of == kind) for kind in dtypes}
        self._all = {kind: torch.zeros(size, dtype=kind) for kind, size in sizes.items()}
        self.parts = self._cut(self._all)
        self.addresses = [c_void_p(part.data_ptr()) for part in self.parts]
        self._views: list[Tensor] = []

    def renew(self) -> None:
        """Have the gradients of the next pass written to other memory: what was taken of the last one stays."""
        if torch.float32 not in self._all:
            return
        self._all[torch.float32] = torch.empty_like(self._all[torch.float32])
        self._views = self._cut(self._all)
        for part, address, new in zip(self.parts, self.addresses, self._views, strict=True):
            if part.dtype == torch.float32:
                part.data, address.value = new, new.data_ptr()

    def take(self) -> list[Tensor]:
        """Return the gradients of the pass that :meth:`renew` began in float32: once, those that are so as they are.

        Nothing here refers to the tensors that are returned, or autograd would copy what it adds up.
        """
        views, self._views = self._views, []
        if len(self._all) == 1 and torch.float32 in self._all:
            return views
        return self._cut({kind: each.to(torch.float32) for kind, each in self._all.items()})

    def _cut(self, together: dict[torch.dtype, Tensor]) -> list[Tensor]:
        sizes: dict[torch.dtype, list[int]] = {kind: [] for kind in together}
        for shape, kind in zip(self._shapes, self._dtypes, strict=True):
            sizes[kind].append(shape.numel())
        parts = {kind: iter(together[kind].split(each)) for kind, each in sizes.items()}
        return [next(parts[kind]).view(shape) for shape, kind in zip(self._shapes, self._dtypes, strict=True)]
