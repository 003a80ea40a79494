"""Fast decoding, one token at a time: what :class:`mmrec.model.RecurrentLM` computes, in preallocated buffers.

The model's ``forward`` allocates some forty tensors per layer and token, and at the size of a laptop's models that
costs far more than the arithmetic. Here every operation writes into a buffer of its own, and those on a few numbers
are numpy's, in the same memory: a call of numpy takes a third of the time of one of torch. Products with matrices are
torch's, and so is what numpy lacks. One text, float32, on a CPU; no matrix is copied, and a recurrent layer that has
no step here is decoded by its own ``forward``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import RMSNorm
from mmrec.model.lm import RecurrentLM
from mmrec.model.ops.reference import LRU_EPSILON
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.recurrent_layer import RecurrentLayer
from mmrec.model.rg_lru import RGLRU
from mmrec.model.state import LayerState, State


class Decoder:
    """Reads one token at a time, and keeps the state of what was read.

    Args:
        net: the model, in float32 on a CPU, in evaluation mode.
        state: of one text, as :meth:`~mmrec.model.RecurrentLM.forward` returns it. It is not changed.
    """

    @torch.inference_mode()
    def __init__(self, net: RecurrentLM, state: State) -> None:
        self.embedding = net.embedding.weight.detach().numpy()
        self.head = net.head.weight.detach()
        self.x = torch.empty(net.config.dim)
        self.stream = self.x.numpy()
        self.norm = NormStep(net.norm, self.stream)
        self.logits = torch.empty(len(self.head))
        self.steps: list[RecurrentStep | FeedForwardStep] = []
        for block, layer, (past, memory) in zip(net.blocks, net.recurrent_layers(), state, strict=True):
            kind = STEPS.get(type(layer), ModuleStep)
            norm = NormStep(block.get_submodule("memory_norm"), self.stream)
            self.steps.append(kind(layer, norm, (past.clone(), memory.clone())))
            norm = NormStep(block.get_submodule("ffn_norm"), self.stream)
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
        return [step.state() for step in self.steps if isinstance(step, RecurrentStep)]


class NormStep:
    """RMS normalization of the residual stream [D], with the scale left to the matrix product that follows."""

    def __init__(self, norm: nn.Module, stream: np.ndarray) -> None:
        assert isinstance(norm, RMSNorm)
        self.stream, self.weight = stream, norm.weight.detach().numpy()
        self.normal, self.share = torch.empty(len(stream)), 1 / len(stream)
        self.weighted = self.normal.numpy()

    def __call__(self) -> tuple[Tensor, float]:
        """Return the stream times the weight, and the number that it is still to be multiplied by."""
        np.multiply(self.stream, self.weight, out=self.weighted)
        return self.normal, (float(self.stream.dot(self.stream)) * self.share + RMSNorm.EPSILON) ** -0.5


class ConvolutionRing:
    """The last C inputs of a causal convolution, in a ring: nothing is moved, the weights are rolled instead."""

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
        """Read ``x`` [channels]; the convolution's output is in ``sum``, and ``out``, until the next call."""
        np.copyto(self.rows[self.next], x)
        self.next = (self.next + 1) % len(self.rows)
        np.multiply(self.rows, self.taps[self.next], out=self.products)
        np.dot(self.ones, self.products, out=self.out)

    def past(self) -> Tensor:
        """Return the last C - 1 inputs, [1, C - 1, channels]."""
        return self.seen.roll(-self.next, dims=0)[1:].unsqueeze(0)


class RecurrentStep(ABC):
    """One token of a recurrent layer: reads the residual stream [D] and adds the layer's output to it, in place.

    Args:
        layer: the layer.
        norm: the normalization before it, which reads the stream.
        state: of one text; it is changed from step to step.
    """

    @abstractmethod
    def __init__(self, layer: RecurrentLayer, norm: NormStep, state: LayerState) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> None: ...

    @abstractmethod
    def state(self) -> LayerState:
        """Return the state after the last token; it may share memory with what the next step changes."""


class ModuleStep(RecurrentStep):
    """Any other layer, by its own ``forward``."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, state: LayerState) -> None:
        self.layer, self.norm, self.after = layer, norm, state

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        y, self.after = self.layer((normal * scale)[None, None], self.after)
        x += y[0, 0]

    def state(self) -> LayerState:
        return self.after


class RGLRUStep(RecurrentStep):
    """:class:`mmrec.model.RGLRU`."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, state: LayerState) -> None:
        assert isinstance(layer, RGLRU)
        self.norm = norm
        self.project, self.output = layer.project.weight.detach(), layer.output.weight.detach()
        width = len(layer.rate)
        self.bias = torch.zeros(len(self.project))
        bias = layer.split(self.bias)
        bias.recurrence_gate.copy_(layer.r_bias.detach())
        bias.input_gate.copy_(layer.i_bias.detach())
        self.neg_rate = (-layer.decay_rate()).detach().numpy()
        self.conv = ConvolutionRing(layer.conv.weight, state[0])
        self.state_tensor = state[1][0]
        self.h = self.state_tensor.numpy()
        self.projected = torch.empty(len(self.project))
        parts = layer.split(self.projected)
        self.values, self.r, self.i, self.gated = (part.numpy() for part in parts)
        self.gates = self.projected[width:]  # all but the values: three neighbours, opened by one sigmoid
        self.out = parts.output_gate
        self.log_decay, self.scale = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        self.conv(self.values)
        self.gates.sigmoid_()
        np.multiply(self.neg_rate, self.r, out=self.log_decay)
        np.multiply(self.log_decay, 2, out=self.scale)
        np.expm1(self.scale, out=self.scale)
        np.subtract(LRU_EPSILON, self.scale, out=self.scale)
        np.sqrt(self.scale, out=self.scale)
        np.exp(self.log_decay, out=self.log_decay)
        np.multiply(self.h, self.log_decay, out=self.h)
        np.multiply(self.scale, self.i, out=self.scale)
        np.multiply(self.scale, self.conv.out, out=self.scale)
        np.add(self.h, self.scale, out=self.h)
        np.multiply(self.h, self.gated, out=self.gated)
        x.addmv_(self.output, self.out)

    def state(self) -> LayerState:
        return self.conv.past(), self.state_tensor.unsqueeze(0)


class GatedDeltaNetStep(RecurrentStep):
    """:class:`mmrec.model.GatedDeltaNet`."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, state: LayerState) -> None:
        assert isinstance(layer, GatedDeltaNet)
        self.norm = norm
        self.project, self.output = layer.project.weight.detach(), layer.output.weight.detach()
        heads, self.beta_max = layer.heads, layer.beta_max
        width, size = len(self.output), len(self.output) // heads
        self.bias = torch.zeros(len(self.project))
        bias = layer.split(self.bias)
        bias.decay.copy_(layer.decay_bias.detach())
        self.neg_rate = -layer.log_rate.detach().exp().numpy()
        self.conv = ConvolutionRing(layer.conv.weight, state[0])
        self.state_tensor = state[1][0]
        self.projected = torch.empty(len(self.project))
        parts = layer.split(self.projected)
        self.qkv, self.pre_decay, self.beta, self.pre_gate = parts.qkv.numpy(), *parts[1:]
        self.q, self.k, self.v = self.conv.sum.view(3, heads, 1, size)
        self.qk = self.conv.out[: 2 * width].reshape(2 * heads, size)
        self.squares, self.ones = np.empty_like(self.qk), np.ones(size, dtype=np.float32)
        self.qk_lengths = np.empty(2 * heads, dtype=np.float32)
        self.correction, self.o = torch.empty(heads, 1, size), torch.empty(heads, 1, size)
        # Of the sum of squares instead of their mean, which takes longer to compute.
        self.norm_weight, self.epsilon = (layer.norm.weight.detach() * size**0.5).numpy(), RMSNorm.EPSILON * size
        self.o_lengths = np.empty(heads, dtype=np.float32)
        self.gated = torch.empty(width)
        # Views are made once, too: each costs as much as an operation.
        decay = torch.empty(heads)
        self.decay_rows, self.decay_per_head = decay.numpy(), decay.view(-1, 1, 1)
        self.k_columns, self.beta_rows = self.k.mT, self.beta.numpy().reshape(-1, 1)
        self.correction_rows, self.o_rows = self.correction.numpy()[:, 0], self.o.numpy()[:, 0]
        self.gated_rows = self.gated.numpy().reshape(heads, size)
        self._take_gate_weights(layer, bias.beta)

    def _take_gate_weights(self, layer: GatedDeltaNet, beta_bias: Tensor) -> None:
        """Take the weights of the output gate, and set the bias of the writing strength [H], which is zero."""
        self.gate = layer.gate.weight.detach()
        beta_bias.copy_(layer.beta_bias.detach())

    def _open_gate(self) -> None:
        """Write the output gate [D], which ``pre_gate`` says, to ``gated``."""
        torch.mv(self.gate, self.pre_gate, out=self.gated)
        self.gated.sigmoid_()

    def __call__(self, x: Tensor) -> None:
        normal, scale = self.norm()
        torch.addmv(self.bias, self.project, normal, alpha=scale, out=self.projected)
        self.conv(self.qkv)
        F.silu(self.conv.sum, inplace=True)
        np.multiply(self.qk, self.qk, out=self.squares)
        np.dot(self.squares, self.ones, out=self.qk_lengths)
        self._normalize(self.qk, self.qk_lengths, 1e-6)
        np.multiply(F.softplus(self.pre_decay).numpy(), self.neg_rate, out=self.decay_rows)
        np.exp(self.decay_rows, out=self.decay_rows)
        self.state_tensor.mul_(self.decay_per_head)
        torch.baddbmm(self.v, self.k, self.state_tensor, alpha=-1, out=self.correction)
        self.beta.sigmoid_()
        np.multiply(self.correction_rows, self.beta_rows, out=self.correction_rows)
        self.state_tensor.baddbmm_(self.k_columns, self.correction, alpha=self.beta_max)
        torch.bmm(self.q, self.state_tensor, out=self.o)
        np.multiply(self.o_rows, self.o_rows, out=self.correction_rows)
        np.dot(self.correction_rows, self.ones, out=self.o_lengths)
        self._normalize(self.o_rows, self.o_lengths, self.epsilon)
        np.multiply(self.o_rows, self.norm_weight, out=self.o_rows)
        self._open_gate()
        np.multiply(self.gated_rows, self.o_rows, out=self.gated_rows)
        x.addmv_(self.output, self.gated)

    @staticmethod
    def _normalize(rows: np.ndarray, squares: np.ndarray, epsilon: float) -> None:
        """Divide each of ``rows`` [R, S] by its length, whose square is in ``squares`` [R], in place."""
        np.add(squares, epsilon, out=squares)
        np.sqrt(squares, out=squares)
        np.divide(rows, squares[:, None], out=rows)

    def state(self) -> LayerState:
        return self.conv.past(), self.state_tensor.unsqueeze(0)


class PortableStep(GatedDeltaNetStep):
    """:class:`mmrec.model.PortableGatedDeltaNet`."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, state: LayerState) -> None:
        super().__init__(layer, norm, state)
        self.epsilon *= len(self.ones)  # in the place of the scale of the queries

    def _take_gate_weights(self, layer: GatedDeltaNet, beta_bias: Tensor) -> None:
        pass

    def _open_gate(self) -> None:
        self.gated.copy_(F.silu(self.pre_gate, inplace=True))


class FeedForwardStep:
    """The feed-forward network of a block."""

    def __init__(self, ffn: nn.Module, norm: NormStep) -> None:
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


STEPS: dict[type[RecurrentLayer], type[RecurrentStep]] = {
    RGLRU: RGLRUStep,
    GatedDeltaNet: GatedDeltaNetStep,
    PortableGatedDeltaNet: PortableStep,
}
"""The recurrent layers that have a step here; the others take :class:`ModuleStep`."""
