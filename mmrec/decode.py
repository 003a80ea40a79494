"""One token after the other, fast: what :class:`mmrec.model.MemoryLM` computes, in buffers that are made once.

The plain model makes some forty new tensors per layer and token, and at the size of a laptop's models that costs far
more than the arithmetic. Here every operation writes into a buffer of its own. One text, float32, on a CPU; no
matrix is copied, and a memory that has no fast step here takes the plain one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model import LayerState, LongMemory, Memory, MemoryLM, RMSNorm, ShortMemory, State
from mmrec.ops.reference import LRU_EPSILON


class Decoder:
    """Reads one token at a time, and keeps the state of what was read.

    Args:
        net: the model, in float32 on a CPU, in evaluation mode.
        state: of one text, as :meth:`MemoryLM.forward` returns it. It is not changed.
    """

    @torch.inference_mode()
    def __init__(self, net: MemoryLM, state: State) -> None:
        self.embedding = net.embedding.weight.detach()
        self.head = net.head.weight.detach()
        self.norm = Norm(net.norm)
        self.x = torch.empty(net.shape.dim)
        self.logits = torch.empty(len(self.head))
        self.steps: list[MemoryStep | FeedForwardStep] = []
        for block, (past, memory) in zip(net.blocks, state, strict=True):
            part = block.get_submodule("memory")
            kind = STEPS.get(type(part), PlainStep)
            norm = Norm(block.get_submodule("memory_norm"))
            self.steps.append(kind(part, norm, (past.clone(), memory.clone())))
            self.steps.append(FeedForwardStep(block.get_submodule("ffn"), Norm(block.get_submodule("ffn_norm"))))

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read ``token`` and return the logits of the next one [N], in a buffer that the next call overwrites."""
        self.x.copy_(self.embedding[token])
        for step in self.steps:
            step(self.x)
        normal, scale = self.norm(self.x)
        return torch.addmv(self.logits, self.head, normal, beta=0, alpha=scale, out=self.logits)

    def state(self) -> State:
        """Return a copy of the state after the last token, as the model takes it."""
        return [(past.clone(), memory.clone()) for past, memory in self._states()]

    def _states(self) -> list[LayerState]:
        return [step.state() for step in self.steps if isinstance(step, MemoryStep)]


class Norm:
    """Root mean square normalization, with the scale left to the matrix product that follows."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm)
        self.weight = norm.weight.detach()
        self.buffer, self.share = torch.empty_like(self.weight), 1 / len(self.weight)

    def __call__(self, x: Tensor) -> tuple[Tensor, float]:
        """Return ``x * weight``, and the number that it is still to be multiplied by."""
        torch.mul(x, self.weight, out=self.buffer)
        return self.buffer, (torch.dot(x, x).item() * self.share + RMSNorm.EPSILON) ** -0.5


class Window:
    """The last C inputs of a convolution, as a ring: nothing is moved, the weights turn instead."""

    def __init__(self, weight: Tensor, past: Tensor) -> None:
        width = weight.shape[1]
        self.seen = torch.cat([past[0], past.new_empty(1, past.shape[-1])])
        self.taps = [weight.detach().T.roll(turn, dims=0).contiguous() for turn in range(width)]
        self.products, self.sum = torch.empty_like(self.seen), torch.empty_like(self.seen[0])
        self.rows = self.seen.unbind()
        self.next = width - 1  # where the next input goes; the ring begins after it

    def __call__(self, x: Tensor) -> Tensor:
        self.rows[self.next].copy_(x)
        self.next = (self.next + 1) % len(self.rows)
        torch.mul(self.seen, self.taps[self.next], out=self.products)
        return torch.sum(self.products, dim=0, out=self.sum)

    def past(self) -> Tensor:
        """Return the last C - 1 inputs, [1, C - 1, channels]."""
        return self.seen.roll(-self.next, dims=0)[1:].unsqueeze(0)


class MemoryStep(ABC):
    """Reads the stream of one token [D] through a memory and adds what it says to it, in place."""

    @abstractmethod
    def __call__(self, x: Tensor) -> None: ...

    @abstractmethod
    def state(self) -> LayerState:
        """Return the state after the last token; it may share memory with what the next step changes."""


class PlainStep(MemoryStep):
    """Any memory, as the model computes it."""

    def __init__(self, memory: nn.Module, norm: Norm, state: LayerState) -> None:
        assert isinstance(memory, Memory)
        self.memory, self.norm, self.after = memory, norm, state

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm(x)
        y, self.after = self.memory((normal * scale)[None, None], self.after)
        x += y[0, 0]

    def state(self) -> LayerState:
        return self.after


class ShortStep(MemoryStep):
    """:class:`mmrec.model.ShortMemory`."""

    def __init__(self, memory: nn.Module, norm: Norm, state: LayerState) -> None:
        assert isinstance(memory, ShortMemory)
        self.norm = norm
        self.project, self.output = memory.project.weight.detach(), memory.output.weight.detach()
        width = len(memory.rate)
        zero = torch.zeros(width)
        self.bias = torch.cat([zero, memory.r_bias, memory.i_bias, zero]).detach()
        self.rate = (-memory.SHARPNESS * F.softplus(memory.rate)).detach()
        self.conv = Window(memory.conv.weight, state[0])
        self.memory = state[1][0]
        self.projected = torch.empty(4 * width)
        self.z, self.r, self.i, self.gate = self.projected.chunk(4)
        self.gates = self.projected[width:]
        self.decay, self.scale = torch.empty(width), torch.empty(width)
        self.epsilon = torch.tensor(LRU_EPSILON)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm(x)
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        z = self.conv(self.z)
        self.gates.sigmoid_()
        torch.mul(self.rate, self.r, out=self.decay)
        torch.mul(self.decay, 2, out=self.scale).expm1_()
        torch.sub(self.epsilon, self.scale, out=self.scale).sqrt_()
        self.memory.mul_(self.decay.exp_()).addcmul_(self.scale.mul_(self.i), z)
        torch.mul(self.memory, self.gate, out=self.gate)
        x.addmv_(self.output, self.gate)

    def state(self) -> LayerState:
        return self.conv.past(), self.memory.unsqueeze(0)


class LongStep(MemoryStep):
    """:class:`mmrec.model.LongMemory`."""

    def __init__(self, memory: nn.Module, norm: Norm, state: LayerState) -> None:
        assert isinstance(memory, LongMemory)
        self.norm = norm
        self.project, self.output = memory.project.weight.detach(), memory.output.weight.detach()
        self.gate = memory.gate.weight.detach()
        heads, self.strongest = memory.heads, memory.strongest
        width, size = len(self.output), len(self.output) // heads
        self.bias = torch.zeros(len(self.project))
        self.bias[3 * width : 3 * width + heads] = memory.decay_bias.detach()
        self.bias[3 * width + heads : 3 * width + 2 * heads] = memory.beta_bias.detach()
        self.rate = -memory.log_rate.detach().exp()
        self.conv = Window(memory.conv.weight, state[0])
        self.memory = state[1][0]
        self.projected = torch.empty(len(self.project))
        self.qkv, self.decay, self.beta, self.low = self.projected.split(memory.splits)
        mixed = self.conv.sum.view(3, heads, 1, size)
        self.q, self.k, self.v = mixed
        self.qk, self.squares = mixed[:2], torch.empty(2, heads, 1, size)
        self.lengths = torch.empty(2, heads, 1, 1)
        self.rates = torch.empty(heads)
        self.told, self.read = torch.empty(heads, 1, size), torch.empty(heads, 1, size)
        # Of the sum of squares instead of their mean, which takes longer to compute.
        self.head_weight, self.epsilon = memory.norm.weight.detach() * size**0.5, RMSNorm.EPSILON * size
        # Views are made once, too: each costs as much as an operation.
        self.per_head, self.strength, self.columns = self.rates.view(-1, 1, 1), self.beta.view(-1, 1, 1), self.k.mT
        self.spoken = self.read.view(-1)
        self.powers = torch.empty(heads, 1, 1)
        self.opened = torch.empty(width)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm(x)
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        F.silu(self.conv(self.qkv), inplace=True)
        torch.mul(self.qk, self.qk, out=self.squares)
        torch.sum(self.squares, dim=-1, keepdim=True, out=self.lengths)
        self.qk.mul_(self.lengths.add_(1e-6).rsqrt_())
        torch.mul(F.softplus(self.decay), self.rate, out=self.rates)
        self.rates.exp_()
        self.memory.mul_(self.per_head)
        torch.baddbmm(self.v, self.k, self.memory, alpha=-1, out=self.told)
        self.beta.sigmoid_()
        self.told.mul_(self.strength)
        self.memory.baddbmm_(self.columns, self.told, alpha=self.strongest)
        torch.bmm(self.q, self.memory, out=self.read)
        torch.mul(self.read, self.read, out=self.told)
        torch.sum(self.told, dim=-1, keepdim=True, out=self.powers)
        self.read.mul_(self.powers.add_(self.epsilon).rsqrt_()).mul_(self.head_weight)
        torch.mv(self.gate, self.low, out=self.opened)
        self.opened.sigmoid_().mul_(self.spoken)
        x.addmv_(self.output, self.opened)

    def state(self) -> LayerState:
        return self.conv.past(), self.memory.unsqueeze(0)


class FeedForwardStep:
    """:class:`mmrec.model.FeedForward`."""

    def __init__(self, ffn: nn.Module, norm: Norm) -> None:
        self.norm = norm
        self.project = ffn.get_parameter("project.weight").detach()
        self.output = ffn.get_parameter("output.weight").detach()
        self.projected = torch.empty(len(self.project))
        self.value, self.gate = self.projected.chunk(2)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm(x)
        torch.addmv(self.projected, self.project, normal, beta=0, alpha=scale, out=self.projected)
        F.silu(self.gate, inplace=True)
        self.value.mul_(self.gate)
        x.addmv_(self.output, self.value)


STEPS: dict[type[nn.Module], type[ShortStep] | type[LongStep]] = {ShortMemory: ShortStep, LongMemory: LongStep}
