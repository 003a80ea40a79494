"""All steps of a model between its embedding and its output layer, and which models have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import CausalConv, FeedForward, RMSNorm
from mmrec.model.lm import Block, RecurrentLM
from mmrec.model.ops import dispatch
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.rg_lru import RGLRU
from mmrec.model.state import State
from mmrec.model.token_counts import TokenCounts
from mmrec.model.without_autograd.buffers import Room
from mmrec.model.without_autograd.memories import LongStep, MemoryStep, ShortStep
from mmrec.model.without_autograd.steps import FeedForwardStep, Norm, Step

KNOWN = (
    *(RecurrentLM, Block, RMSNorm, RGLRU, GatedDeltaNet, PortableGatedDeltaNet, CausalConv, FeedForward),
    TokenCounts,
    *(nn.ModuleList, nn.Linear, nn.Embedding, nn.Dropout),
)
"""The modules that there are steps for; with a subclass or a hook they may be something else."""


def has_steps(net: RecurrentLM, dtype: torch.dtype) -> bool:
    """Return whether steps can compute ``net`` with products of ``dtype``: they know its parts, and have kernels."""
    return dispatch.has_native(dtype) and all(
        type(module) in KNOWN and not module._forward_hooks and not module._forward_pre_hooks
        for module in net.modules()
    ) and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in net.parameters())  # fmt: skip


class Blocks:
    """All blocks of a model and its last norm, from the stream x [P, D] on.

    Attributes:
        x: [P, D], which is read.
        norm: the last norm, whose ``y`` is what the output layer reads, and whose ``to_y`` is its gradient.
    """

    def __init__(self, room: Room, net: RecurrentLM) -> None:
        self.room = room
        self.x = x = room.kept(net.config.dim, torch.float32)
        self._steps: list[Step] = []
        self._memories: list[MemoryStep] = []
        for block in net.blocks:
            assert isinstance(block, Block)
            kind = ShortStep if isinstance(block.memory, RGLRU) else LongStep
            memory = kind(room, block.memory, block.memory_norm, x)  # type: ignore[arg-type]
            ffn = FeedForwardStep(room, block.ffn, block.ffn_norm, memory.after)
            self._memories.append(memory)
            self._steps += [memory, ffn]
            x = ffn.after
        self.norm = Norm(room, net.norm, x)
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        self.room.refresh()
        for memory in self._memories:
            memory.refresh()

    def forward(self, state: State) -> State:
        """Compute ``norm.y`` on from ``state``; return the state after the last token."""
        for memory, before in zip(self._memories, state, strict=True):
            memory.set_state(before)
        for step in self._steps:
            step.forward()
        self.norm.forward()
        return [memory.state() for memory in self._memories]

    def backward(self) -> Tensor:
        """Write the gradients of what was computed last from ``norm.to_y``; return that of ``x``, a buffer [P, D]."""
        to_x = self.room.to_x
        to_x.zero_()
        self.norm.backward()
        for step in reversed(self._steps):
            step.backward()
        self.room.add_up()
        return to_x
