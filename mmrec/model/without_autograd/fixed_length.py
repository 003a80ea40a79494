"""A pass over one row of a fixed number of tokens, and its gradients, in buffers made once and without autograd.

Its steps are those of this folder, on a CPU. Legend of shapes as in :mod:`mmrec.model`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrec.model.lm import RecurrentLM
from mmrec.model.ops.native.products import has_tiles
from mmrec.model.state import LayerState, State
from mmrec.model.token_counts import TokenCounts
from mmrec.model.without_autograd.blocks import Blocks, has_steps
from mmrec.model.without_autograd.buffers import Room
from mmrec.model.without_autograd.steps import Product

TILE_THREADS = 4
"""Threads of torch that multiply in float32 as fast as one does tiles of bfloat16."""


def has_fixed_length_pass(net: RecurrentLM) -> bool:
    """Return whether :class:`FixedLengthPass` can compute ``net``."""
    return has_steps(net, torch.float32)


def pass_dtype() -> torch.dtype:
    """Return the dtype of matrix products with which a pass over a short row is fastest.

    bfloat16 where there are products of tiles, which one thread computes, else float32: torch's products of bfloat16
    take longer at so few tokens.
    """
    return torch.bfloat16 if has_tiles() and torch.get_num_threads() < TILE_THREADS else torch.float32


class FixedLengthPass:
    """Reads rows of T tokens, one at a time, with the weights as they are then; and differentiates what it read.

    Args:
        net: the model, one of those of :func:`has_fixed_length_pass`. Its parameters stay where they are in memory.
        length: T.
        logits: [T, N], contiguous: where those after each token are written; a buffer of its own if None.
        gradients: by the name of a parameter, contiguous and of its shape: where its gradient is written. Parameters
            that have none here are not differentiated by.
        dtype: of the blocks' matrix products: float32, or bfloat16 where :func:`pass_dtype` says so.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        net: RecurrentLM,
        length: int,
        logits: Tensor | None = None,
        gradients: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        found = gradients or {}
        self._learns = bool(found)
        written = {id(parameter): found[name] for name, parameter in net.named_parameters() if name in found}
        room = Room((1, length), net.config.dim, written, dtype)
        self._embedding, self._to_embedding = net.embedding.weight.detach(), room.gradient(net.embedding.weight)
        self._tokens = torch.zeros(length, dtype=torch.int64)
        self._blocks = Blocks(room, net)
        self.logits = torch.zeros(length, len(net.head.weight)) if logits is None else logits
        self._head = Product(room, net.head.weight, self._blocks.norm.y, self.logits)
        self._is_tied = net.head.weight is net.embedding.weight
        self._counts = None if net.counts is None else _Counts(net.counts, written)

    @torch.no_grad()
    def read(self, tokens: Tensor, state: State) -> State:
        """Read ``tokens`` [T] on from the state of one text; return the state after them.

        :attr:`logits` [T, N] are those after each token; the next call overwrites them.
        """
        if self._learns:
            self._blocks.refresh()
        self._tokens.copy_(tokens)
        torch.index_select(self._embedding, 0, self._tokens, out=self._blocks.x)
        layers = state if self._counts is None else state[:-1]
        after = self._blocks.forward(layers)
        self._head.forward()
        if self._counts is None:
            return after
        return [*after, self._counts.add(self.logits, self._blocks.norm.y, self._tokens, state[-1])]

    @torch.no_grad()
    def differentiate(self, to_logits: Tensor) -> None:
        """Write the gradients of what was read last, whose gradient by :attr:`logits` is ``to_logits`` [T, N]."""
        self._head.backward(to_logits, self._blocks.norm.to_y)
        if self._counts is not None:
            self._counts.differentiate(to_logits, self._blocks.norm.to_y)
        to_x = self._blocks.backward()
        if self._to_embedding is not None:
            if not self._is_tied:  # else it holds the gradient of the head by now
                self._to_embedding.zero_()
            self._to_embedding.index_add_(0, self._tokens, to_x)


class _Counts:
    """What counts of tokens add to logits, by autograd: they are little of a pass.

    Args:
        counts: the module.
        written: by the ``id`` of a parameter, where its gradient is written.
    """

    def __init__(self, counts: TokenCounts, written: dict[int, Tensor]) -> None:
        self._counts = counts
        learns = [parameter for parameter in counts.parameters() if id(parameter) in written]
        self._learns, self._written = learns, [written[id(parameter)] for parameter in learns]

    def add(self, logits: Tensor, hidden: Tensor, tokens: Tensor, before: LayerState) -> LayerState:
        """Add to ``logits`` [T, N], of tokens [T] with ``hidden`` [T, D], in place; return the state after them."""
        with torch.enable_grad():
            self._hidden = hidden[None].clone().requires_grad_()
            features, after = self._counts.read(tokens[None], before)
            self._added = self._counts.added(self._hidden, features)
        logits += self._added[0].detach()
        return after

    def differentiate(self, to_logits: Tensor, to_hidden: Tensor) -> None:
        """Add to ``to_hidden`` [T, D], and write the gradients of what learns."""
        (own, *gradients) = torch.autograd.grad(self._added, [self._hidden, *self._learns], to_logits[None])
        to_hidden += own[0]
        for gradient, written in zip(gradients, self._written, strict=True):
            written.copy_(gradient)
