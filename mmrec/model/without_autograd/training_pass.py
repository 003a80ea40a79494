"""The blocks of a model in training, forwards and backwards, in buffers made once: one node of autograd's graph.

Beside :meth:`mmrec.model.RecurrentLM.hidden_from_embeddings`, which computes the same with a graph of its own. Its
steps are those of this folder; on a CPU, by one thread. Legend of shapes as in :mod:`mmrec.model`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec.model.lm import Hidden, RecurrentLM
from mmrec.model.state import State
from mmrec.model.without_autograd.blocks import Blocks, has_steps
from mmrec.model.without_autograd.buffers import Gradients, Room
from mmrec.model.without_autograd.steps import uses_tiles

PASSES = 2
"""Shapes of batches whose buffers are kept: rows of an epoch differ in length by one token."""


def has_training_pass(net: RecurrentLM) -> bool:
    """Return whether :class:`TrainingPass` can compute ``net`` here, with products of autocast's dtype."""
    return (
        has_steps(net, _product_dtype())
        and torch.get_num_threads() == 1
        and not any(getattr(block, "activation_checkpointing", False) for block in net.blocks)
    )


def hidden_in_training(net: RecurrentLM) -> Callable[[Tensor, State], tuple[Hidden, State]]:
    """Return what computes :meth:`mmrec.model.RecurrentLM.hidden` as ``mmrec fit`` does: a pass, or the method."""
    return TrainingPass(net).hidden if has_training_pass(net) else net.hidden


def _product_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


class TrainingPass:
    """Reads batches as ``net`` does in training, one at a time: the gradients of one belong to the last one read.

    Args:
        net: the model, one of those of :func:`has_training_pass`, with its dropout. The state that it reads on from
            gets no gradient.

    Attributes:
        reads: how many batches were read, or differentiated: what is in the buffers.
    """

    def __init__(self, net: RecurrentLM) -> None:
        self._net = net
        self._parameters: list[Tensor] = [*net.blocks.parameters(), *net.norm.parameters()]
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}
        self._places: list[int] = []
        self._memory: list[Tensor] = []
        self.reads = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the addresses in the buffers are those of this one."""
        return self.__dict__ | {"_buffers": {}, "_places": [], "_memory": []}

    def hidden(self, tokens: Tensor, state: State) -> tuple[Hidden, State]:
        """Return what :meth:`mmrec.model.RecurrentLM.hidden` does."""
        x = self._net.dropout(self._net.embedding(tokens))
        places = [parameter.data_ptr() for parameter in self._parameters]
        if places != self._places:  # somebody has put other tensors in the place of the weights
            self._buffers, self._places = {}, places
        key = x.shape[0], x.shape[1], _product_dtype()
        if key not in self._buffers:
            if len(self._buffers) == PASSES:
                del self._buffers[next(iter(self._buffers))]
            self._buffers[key] = _Buffers(self._net, self._parameters, self._memory, *key)
        buffers, before = self._buffers[key], [part for layer in state[: len(self._net.blocks)] for part in layer]
        hidden, *parts = _Blocks.apply(self, buffers, x, *before, *self._parameters)
        after = list(zip(parts[::2], parts[1::2], strict=True))
        return self._net.with_counts(hidden, after, tokens, state)


class _Buffers:
    """What a batch of one shape is computed in: ``memory``, which those of other shapes share."""

    @torch.no_grad()
    def __init__(
        self,
        net: RecurrentLM,
        parameters: list[Tensor],
        memory: list[Tensor],
        rows: int,
        length: int,
        dtype: torch.dtype,
    ) -> None:
        narrow = set() if uses_tiles(dtype) else {id(matrix) for matrix in net.matrices()}
        dtypes = [dtype if id(parameter) in narrow else parameter.dtype for parameter in parameters]
        self.gradients = Gradients([parameter.shape for parameter in parameters], dtypes)
        numbers = [id(parameter) for parameter in parameters]
        written = dict(zip(numbers, self.gradients.parts, strict=True))
        addresses = dict(zip(numbers, self.gradients.addresses, strict=True))
        dropout = net.dropout.p if net.training else 0.0
        room = Room((rows, length), net.config.dim, written, dtype, dropout, memory, addresses)
        self.blocks = Blocks(room, net)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: TrainingPass, buffers: _Buffers, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        blocks = buffers.blocks
        parts = others[: len(others) - len(buffers.gradients.parts)]
        blocks.refresh()
        blocks.x.copy_(x.flatten(0, 1))
        after = blocks.forward(list(zip(parts[::2], parts[1::2], strict=True)))
        of.reads += 1
        ctx.of, ctx.reads, ctx.buffers, ctx.states = of, of.reads, buffers, len(parts)
        flat = [part for layer in after for part in layer]
        ctx.mark_non_differentiable(*flat)
        return blocks.norm.y.view_as(x).clone(), *flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        buffers = ctx.buffers
        if ctx.reads != ctx.of.reads:
            raise RuntimeError("the buffers of this batch hold another one by now, or its gradients are taken")
        ctx.of.reads += 1
        buffers.gradients.renew()  # a graph may keep what it was given
        buffers.blocks.norm.to_y.copy_(grad.flatten(0, 1))
        to_x = buffers.blocks.backward().view_as(grad).clone()
        return (
            None,
            None,
            to_x,
            *(None for _ in range(ctx.states)),
            *buffers.gradients.take(),
        )
