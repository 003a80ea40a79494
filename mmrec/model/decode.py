"""One token after the other, fast: what :class:`mmrec.model.RecurrentLM` computes, in buffers that are made once.

The plain model makes some forty new tensors per layer and token, and at the size of a laptop's models that costs
far more than the arithmetic. Here every operation writes into a buffer of its own, and those on a few numbers are
numpy's, in the same memory: a call of numpy takes a third of the time of one of torch. Products with matrices are
torch's, and so is what numpy lacks. One text, float32, on a CPU; no matrix is copied, and a memory that has no fast
step here takes the plain one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model import RGLRU, GatedDeltaNet, LayerState, RecurrentLayer, RecurrentLM, RMSNorm, State
from mmrec.model.ops.reference import LRU_EPSILON


class Decoder:
    """Reads one token at a time, and keeps the state of what was read.

    Args:
        net: the model, in float32 on a CPU, in evaluation mode.
        state: of one text, as :meth:`RecurrentLM.forward` returns it. It is not changed.
    """

    @torch.inference_mode()
    def __init__(self, net: RecurrentLM, state: State) -> None:
        self.embedding = net.embedding.weight.detach().numpy()
        self.head = net.head.weight.detach()
        self.x = torch.empty(net.config.dim)
        self.stream = self.x.numpy()
        self.norm = Norm(net.norm, self.stream)
        self.logits = torch.empty(len(self.head))
        self.steps: list[MemoryStep | FeedForwardStep] = []
        for block, (past, memory) in zip(net.blocks, state, strict=True):
            part = block.get_submodule("memory")
            kind = STEPS.get(type(part), PlainStep)
            norm = Norm(block.get_submodule("memory_norm"), self.stream)
            self.steps.append(kind(part, norm, (past.clone(), memory.clone())))
            norm = Norm(block.get_submodule("ffn_norm"), self.stream)
            self.steps.append(FeedForwardStep(block.get_submodule("ffn"), norm))

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read ``token`` and return the logits of the next one [N], in a buffer that the next call overwrites."""
        np.copyto(self.stream, self.embedding[token])
        for step in self.steps:
            step(self.x)
        normal, scale = self.norm()
        return torch.addmv(self.logits, self.head, normal, beta=0, alpha=scale, out=self.logits)

    def state(self) -> State:
        """Return a copy of the state after the last token, as the model takes it."""
        return [(past.clone(), memory.clone()) for past, memory in self._states()]

    def _states(self) -> list[LayerState]:
        return [step.state() for step in self.steps if isinstance(step, MemoryStep)]


class Norm:
    """Root mean square normalization of the stream [D], with the scale left to the matrix product that follows."""

    def __init__(self, norm: nn.Module, stream: np.ndarray) -> None:
        assert isinstance(norm, RMSNorm)
        self.stream, self.weight = stream, norm.weight.detach().numpy()
        self.normal, self.share = torch.empty(len(stream)), 1 / len(stream)
        self.weighted = self.normal.numpy()

    def __call__(self) -> tuple[Tensor, float]:
        """Return the stream times the weight, and the number that it is still to be multiplied by."""
        np.multiply(self.stream, self.weight, out=self.weighted)
        return self.normal, (float(self.stream.dot(self.stream)) * self.share + RMSNorm.EPSILON) ** -0.5


class Window:
    """The last C inputs of a convolution, as a ring: nothing is moved, the weights turn instead."""

    def __init__(self, weight: Tensor, past: Tensor) -> None:
        width = weight.shape[1]
        self.seen = torch.cat([past[0], past.new_empty(1, past.shape[-1])])
        self.rows = self.seen.numpy()
        self.taps = [weight.detach().T.roll(turn, dims=0).contiguous().numpy() for turn in range(width)]
        self.products, self.ones = np.empty_like(self.rows), np.ones(width, dtype=np.float32)
        self.sum = torch.empty_like(self.seen[0])
        self.out = self.sum.numpy()
        self.next = width - 1  # where the next input goes; the ring begins after it

    def __call__(self, x: np.ndarray) -> None:
        """Read ``x`` [channels]; what the convolution makes of it is in ``sum``, and ``out``, until the next call."""
        np.copyto(self.rows[self.next], x)
        self.next = (self.next + 1) % len(self.rows)
        np.multiply(self.rows, self.taps[self.next], out=self.products)
        np.dot(self.ones, self.products, out=self.out)

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
        assert isinstance(memory, RecurrentLayer)
        self.memory, self.norm, self.after = memory, norm, state

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        y, self.after = self.memory((normal * scale)[None, None], self.after)
        x += y[0, 0]

    def state(self) -> LayerState:
        return self.after


class ShortStep(MemoryStep):
    """:class:`mmrec.model.RGLRU`."""

    def __init__(self, memory: nn.Module, norm: Norm, state: LayerState) -> None:
        assert isinstance(memory, RGLRU)
        self.norm = norm
        self.project, self.output = memory.project.weight.detach(), memory.output.weight.detach()
        width = len(memory.rate)
        zero = torch.zeros(width)
        self.bias = torch.cat([zero, memory.r_bias, memory.i_bias, zero]).detach()
        self.rate = (-memory.DECAY_SCALE * F.softplus(memory.rate)).detach().numpy()
        self.conv = Window(memory.conv.weight, state[0])
        self.memory = state[1][0]
        self.remembered = self.memory.numpy()
        self.projected = torch.empty(4 * width)
        self.gates = self.projected[width:]
        self.z, self.r, self.i, self.gate = self.projected.numpy().reshape(4, width)
        self.gated = self.projected[3 * width :]
        self.lost, self.scale = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        self.conv(self.z)
        self.gates.sigmoid_()
        np.multiply(self.rate, self.r, out=self.lost)
        np.multiply(self.lost, 2, out=self.scale)
        np.expm1(self.scale, out=self.scale)
        np.subtract(LRU_EPSILON, self.scale, out=self.scale)
        np.sqrt(self.scale, out=self.scale)
        np.exp(self.lost, out=self.lost)
        np.multiply(self.remembered, self.lost, out=self.remembered)
        np.multiply(self.scale, self.i, out=self.scale)
        np.multiply(self.scale, self.conv.out, out=self.scale)
        np.add(self.remembered, self.scale, out=self.remembered)
        np.multiply(self.remembered, self.gate, out=self.gate)
        x.addmv_(self.output, self.gated)

    def state(self) -> LayerState:
        return self.conv.past(), self.memory.unsqueeze(0)


class LongStep(MemoryStep):
    """:class:`mmrec.model.GatedDeltaNet`."""

    def __init__(self, memory: nn.Module, norm: Norm, state: LayerState) -> None:
        assert isinstance(memory, GatedDeltaNet)
        self.norm = norm
        self.project, self.output = memory.project.weight.detach(), memory.output.weight.detach()
        self.gate = memory.gate.weight.detach()
        heads, self.strongest = memory.heads, memory.strongest
        width, size = len(self.output), len(self.output) // heads
        self.bias = torch.zeros(len(self.project))
        self.bias[3 * width : 3 * width + heads] = memory.decay_bias.detach()
        self.bias[3 * width + heads : 3 * width + 2 * heads] = memory.beta_bias.detach()
        self.rate = -memory.log_rate.detach().exp().numpy()
        self.conv = Window(memory.conv.weight, state[0])
        self.memory = state[1][0]
        self.projected = torch.empty(len(self.project))
        _, self.decay, self.beta, self.low = self.projected.split(memory.splits)
        self.qkv = self.projected.numpy()[: 3 * width]
        self.q, self.k, self.v = self.conv.sum.view(3, heads, 1, size)
        self.qk = self.conv.out[: 2 * width].reshape(2 * heads, size)
        self.squares, self.ones = np.empty_like(self.qk), np.ones(size, dtype=np.float32)
        self.lengths = np.empty(2 * heads, dtype=np.float32)
        self.rates = torch.empty(heads)
        self.told, self.read = torch.empty(heads, 1, size), torch.empty(heads, 1, size)
        # Of the sum of squares instead of their mean, which takes longer to compute.
        self.head_weight, self.epsilon = (memory.norm.weight.detach() * size**0.5).numpy(), RMSNorm.EPSILON * size
        # Views are made once, too: each costs as much as an operation.
        self.faded, self.per_head, self.columns = self.rates.numpy(), self.rates.view(-1, 1, 1), self.k.mT
        self.correction, self.strength = self.told.numpy()[:, 0], self.beta.numpy().reshape(-1, 1)
        self.spoken = self.read.numpy()[:, 0]
        self.powers = np.empty(heads, dtype=np.float32)
        self.opened = torch.empty(width)
        self.gated = self.opened.numpy().reshape(heads, size)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        self.conv(self.qkv)
        F.silu(self.conv.sum, inplace=True)
        np.multiply(self.qk, self.qk, out=self.squares)
        np.dot(self.squares, self.ones, out=self.lengths)
        self._normalize(self.qk, self.lengths, 1e-6)
        np.multiply(F.softplus(self.decay).numpy(), self.rate, out=self.faded)
        np.exp(self.faded, out=self.faded)
        self.memory.mul_(self.per_head)
        torch.baddbmm(self.v, self.k, self.memory, alpha=-1, out=self.told)
        self.beta.sigmoid_()
        np.multiply(self.correction, self.strength, out=self.correction)
        self.memory.baddbmm_(self.columns, self.told, alpha=self.strongest)
        torch.bmm(self.q, self.memory, out=self.read)
        np.multiply(self.spoken, self.spoken, out=self.correction)
        np.dot(self.correction, self.ones, out=self.powers)
        self._normalize(self.spoken, self.powers, self.epsilon)
        np.multiply(self.spoken, self.head_weight, out=self.spoken)
        torch.mv(self.gate, self.low, out=self.opened)
        self.opened.sigmoid_()
        np.multiply(self.gated, self.spoken, out=self.gated)
        x.addmv_(self.output, self.opened)

    @staticmethod
    def _normalize(rows: np.ndarray, squares: np.ndarray, epsilon: float) -> None:
        """Divide each of ``rows`` [R, S] by its length, whose square is in ``squares`` [R], in place."""
        np.add(squares, epsilon, out=squares)
        np.sqrt(squares, out=squares)
        np.divide(rows, squares[:, None], out=rows)

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
        self.content, self.opening = self.value.numpy(), self.gate.numpy()

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        torch.addmv(self.projected, self.project, normal, beta=0, alpha=scale, out=self.projected)
        F.silu(self.gate, inplace=True)
        np.multiply(self.content, self.opening, out=self.content)
        x.addmv_(self.output, self.value)


STEPS: dict[type[nn.Module], type[ShortStep] | type[LongStep]] = {RGLRU: ShortStep, GatedDeltaNet: LongStep}
