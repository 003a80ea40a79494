"""Fast decoding, one token at a time: what :class:`mmrec.model.RecurrentLM` computes, in preallocated buffers.

The model's ``forward`` allocates some forty tensors per layer and token, and at the size of a laptop's models that
costs far more than the arithmetic. Here every operation writes into a buffer of its own, and those on a few numbers
are numpy's, in the same memory: a call of numpy takes a third of the time of one of torch. Products with matrices are
torch's, and so is what numpy lacks. Some texts at a time, float32, on a CPU; no matrix is copied, and a recurrent
layer that has no step here is decoded by its own ``forward``. The numbers of a text are the same to the bit whatever
other texts are decoded with it: see :mod:`mmrec.model.decode_rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model.decode_rows import ConvolutionWindow, NormStep, as_rows, buffer, lengths, product
from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import RMSNorm
from mmrec.model.lm import RecurrentLM
from mmrec.model.ops.reference import LRU_EPSILON
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.recurrent_layer import RecurrentLayer
from mmrec.model.rg_lru import RGLRU
from mmrec.model.state import LayerState, State
from mmrec.model.token_counts import SPAN, TokenCounts


class Decoder:
    """Reads one token of each of B texts at a time, and keeps the states of what was read.

    Args:
        net: the model, in float32 on a CPU, in evaluation mode.
        state: of B texts, as :meth:`~mmrec.model.RecurrentLM.forward` returns it. It is not changed.
    """

    @torch.inference_mode()
    def __init__(self, net: RecurrentLM, state: State) -> None:
        rows = len(state[0][0])
        x = buffer(rows, net.config.dim)
        self.embedding, self.stream = net.embedding.weight.detach().numpy(), x.numpy()
        self.memories: list[RecurrentStep] = []
        self.steps: list[RecurrentStep | FeedForwardStep] = []
        for block, layer in zip(net.blocks, net.recurrent_layers(), strict=True):
            norm = NormStep(block.get_submodule("memory_norm"), x)
            self.memories.append(STEPS.get(type(layer), ModuleStep)(layer, norm, x))
            norm = NormStep(block.get_submodule("ffn_norm"), x)
            self.steps += [self.memories[-1], FeedForwardStep(block.get_submodule("ffn"), norm, x)]
        self.norm, self.head = NormStep(net.norm, x), net.head.weight.detach()
        logits = buffer(rows, len(self.head))
        self.predict, self.logits = product(self.head, self.norm.normal, logits), logits
        self.counts = None if net.counts is None else CountsStep(net.counts, self.norm, logits)
        self.set_state(state)

    @torch.inference_mode()
    def set_state(self, state: State) -> None:
        """Go on from another state, of as many texts. It is not changed."""
        for memory, layer in zip(self.memories, state[: len(self.memories)], strict=True):
            memory.set_state(layer)
        if self.counts is not None:
            self.counts.set_state(state[-1])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read a token of each text; return the logits of the next ones [B, N], which the next call overwrites."""
        self.stream[...] = self.embedding[tokens]
        for step in self.steps:
            step()
        self.norm()
        self.predict()
        if self.counts is not None:
            self.counts(tokens)
        return self.logits

    def state(self) -> State:
        """Return a copy of the states after the last tokens, as the model takes it."""
        state = [(past.clone(), memory.clone()) for past, memory in (step.state() for step in self.memories)]
        return state if self.counts is None else [*state, self.counts.state()]


class RecurrentStep(ABC):
    """One token of a recurrent layer: reads the residual stream and adds the layer's output to it, in place.

    Args:
        layer: the layer.
        norm: the normalization before it, which reads the stream.
        x: the residual stream, [B, D], a :func:`~mmrec.model.decode_rows.buffer`.
    """

    @abstractmethod
    def __init__(self, layer: RecurrentLayer, norm: NormStep, x: Tensor) -> None: ...

    @abstractmethod
    def set_state(self, state: LayerState) -> None:
        """Go on from ``state``, of B texts; it is not changed."""

    @abstractmethod
    def __call__(self) -> None: ...

    @abstractmethod
    def state(self) -> LayerState:
        """Return the state after the last token; it may share memory with what the next step changes."""


class ModuleStep(RecurrentStep):
    """Any other layer, by its own ``forward``, which may round otherwise where it has more texts: each for itself."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, x: Tensor) -> None:
        self.layer, self.norm = layer, norm
        self.rows = [(normal.view(1, 1, -1), row) for normal, row in zip(norm.normal, x, strict=True)]

    def set_state(self, state: LayerState) -> None:
        self.after = [*zip(state[0].clone().split(1), state[1].clone().split(1), strict=True)]

    def __call__(self) -> None:
        self.norm()
        for row, (normal, x) in enumerate(self.rows):
            y, self.after[row] = self.layer(normal, self.after[row])
            x += y[0, 0]

    def state(self) -> LayerState:
        past, memory = zip(*self.after, strict=True)
        return torch.cat(past), torch.cat(memory)


class BufferedStep(RecurrentStep):
    """A layer whose state is held in buffers.

    Attributes:
        conv: the inputs of its convolution.
        state_tensor: what else it keeps, [B, ...].
    """

    conv: ConvolutionWindow
    state_tensor: Tensor

    def set_state(self, state: LayerState) -> None:
        self.conv.set_past(state[0])
        self.state_tensor.copy_(state[1])

    def state(self) -> LayerState:
        return self.conv.past(), self.state_tensor


class RGLRUStep(BufferedStep):
    """:class:`mmrec.model.RGLRU`."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, x: Tensor) -> None:
        assert isinstance(layer, RGLRU)
        self.norm = norm
        self.project, self.output = layer.project.weight.detach(), layer.output.weight.detach()
        self.bias = torch.cat([layer.r_bias.detach(), layer.i_bias.detach()]).numpy()
        self.neg_rate = (-layer.decay_rate()).detach().numpy()
        rows, width = len(x), len(self.neg_rate)
        projected = buffer(rows, len(self.project))
        parts = layer.split(projected)
        self.values, self.r, self.i, self.gated = (as_rows(part) for part in parts)
        self.gates = projected[:, width:]  # all but the values: three neighbours, opened by one sigmoid
        self.biased = as_rows(self.gates[:, : 2 * width])
        self.log_decay, self.scale = (as_rows(torch.empty(rows, width)) for _ in range(2))
        self.conv = ConvolutionWindow(layer.conv.weight, rows)
        self.convolved = as_rows(self.conv.sum)
        self.state_tensor = torch.empty(rows, width)
        self.h = as_rows(self.state_tensor)
        self.read = product(self.project, norm.normal, projected)
        self.write = product(self.output, parts.output_gate, x, adds=True)

    def __call__(self) -> None:
        self.norm()
        self.read()
        np.add(self.biased, self.bias, out=self.biased)
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
        np.multiply(self.scale, self.convolved, out=self.scale)
        np.add(self.h, self.scale, out=self.h)
        np.multiply(self.h, self.gated, out=self.gated)
        self.write()


class GatedDeltaNetStep(BufferedStep):
    """:class:`mmrec.model.GatedDeltaNet`."""

    def __init__(self, layer: RecurrentLayer, norm: NormStep, x: Tensor) -> None:
        assert isinstance(layer, GatedDeltaNet)
        self.layer, self.norm = layer, norm
        self.project, self.output = layer.project.weight.detach(), layer.output.weight.detach()
        rows, heads, width = len(x), layer.heads, len(self.output)
        size = width // heads
        projected, gated = buffer(rows, len(self.project)), buffer(rows, width)
        parts = layer.split(projected)
        # Views are made once: each costs as much as an operation.
        self.values, self.pre_decay, self.beta = as_rows(parts.qkv), parts.decay, parts.beta
        self.biased = as_rows(projected[:, 3 * width : 3 * width + 2 * heads])
        self.beta_rows = as_rows(self.beta)[..., None]
        self.gated, self.gated_rows = gated, as_rows(gated.unflatten(1, (heads, size)))
        self.neg_rate = -layer.log_rate.detach().exp().numpy()
        decay = torch.empty(rows, heads)
        self.decay, self.decay_per_head = decay.numpy(), decay.view(-1, 1, 1)
        self.conv = ConvolutionWindow(layer.conv.weight, rows)
        self.convolved = self.conv.sum.numpy().reshape(rows, 3, width).transpose(1, 0, 2)
        qkv = torch.empty(3, rows * heads, 1, size)
        self.q, self.k, self.v = qkv
        self.k_columns = self.k.mT
        self.qkv, self.qk = qkv.view(3, rows, width).numpy(), qkv[:2, :, 0].flatten(0, 1).numpy()
        self.qk_lengths = lengths(self.qk, 1e-6)
        self.correction, self.o = torch.empty(2, rows * heads, 1, size)
        self.correction_rows = as_rows(self.correction.view(rows, heads, size))
        self.o_rows = as_rows(self.o.view(rows, heads, size))
        self.o_lengths = lengths(self.o_rows, self._epsilon(size))
        self.norm_weight = (layer.norm.weight.detach() * size**0.5).numpy()  # as in NormStep
        self.state_tensor = torch.empty(rows, heads, size, size)
        self.matrices = self.state_tensor.flatten(0, 1)
        self.read = product(self.project, norm.normal, projected)
        self.write = product(self.output, gated, x, adds=True)
        self.bias = torch.cat([layer.decay_bias.detach(), self._take_gates(layer, parts.output_gate, gated)]).numpy()

    @staticmethod
    def _epsilon(size: int) -> float:
        """Return what is added to the squared length of a head's output, of ``size`` numbers."""
        return RMSNorm.EPSILON * size

    def _take_gates(self, layer: GatedDeltaNet, pre_gate: Tensor, gated: Tensor) -> Tensor:
        """Read the output gate from ``pre_gate`` [B, any] and write it to ``gated`` [B, D], from now on.

        Returns:
            The bias of the writing strength, [H].
        """
        assert layer.gate is not None
        assert layer.beta_bias is not None
        self.gate = layer.gate.weight.detach()
        self.open = product(self.gate, pre_gate, gated)
        return layer.beta_bias.detach()

    def _open_gate(self) -> None:
        """Write the output gate."""
        self.open()
        self.gated.sigmoid_()

    def __call__(self) -> None:
        self.norm()
        self.read()
        np.add(self.biased, self.bias, out=self.biased)
        self.conv(self.values)
        F.silu(self.conv.sum, inplace=True)
        np.copyto(self.qkv, self.convolved)
        np.divide(self.qk, self.qk_lengths(), out=self.qk)
        np.multiply(F.softplus(self.pre_decay).numpy(), self.neg_rate, out=self.decay)
        np.exp(self.decay, out=self.decay)
        self.matrices.mul_(self.decay_per_head)
        torch.baddbmm(self.v, self.k, self.matrices, alpha=-1, out=self.correction)
        self.beta.sigmoid_()
        np.multiply(self.correction_rows, self.beta_rows, out=self.correction_rows)
        self.matrices.baddbmm_(self.k_columns, self.correction, alpha=self.layer.beta_max)
        torch.bmm(self.q, self.matrices, out=self.o)
        np.divide(self.o_rows, self.o_lengths(), out=self.o_rows)
        np.multiply(self.o_rows, self.norm_weight, out=self.o_rows)
        self._open_gate()
        np.multiply(self.gated_rows, self.o_rows, out=self.gated_rows)
        self.write()


class PortableStep(GatedDeltaNetStep):
    """:class:`mmrec.model.PortableGatedDeltaNet`."""

    @staticmethod
    def _epsilon(size: int) -> float:
        return RMSNorm.EPSILON * size * size  # in the place of the scale of the queries

    def _take_gates(self, layer: GatedDeltaNet, pre_gate: Tensor, gated: Tensor) -> Tensor:
        self.pre_gate = pre_gate
        return torch.zeros(layer.heads)

    def _open_gate(self) -> None:
        self.gated.copy_(F.silu(self.pre_gate, inplace=True))


class FeedForwardStep:
    """The feed-forward network of a block: reads and changes the residual stream, as :class:`RecurrentStep` does."""

    def __init__(self, ffn: nn.Module, norm: NormStep, x: Tensor) -> None:
        self.norm = norm
        self.project = ffn.get_parameter("project.weight").detach()
        self.output = ffn.get_parameter("output.weight").detach()
        projected = buffer(len(x), len(self.project))
        value, gate = projected.chunk(2, dim=1)
        self.gate, self.opening, self.content = gate, as_rows(gate), as_rows(value)
        self.read = product(self.project, norm.normal, projected)
        self.write = product(self.output, value, x, adds=True)

    def __call__(self) -> None:
        self.norm()
        self.read()
        F.silu(self.gate, inplace=True)
        np.multiply(self.content, self.opening, out=self.content)
        self.write()


class CountsStep:
    """:class:`mmrec.model.TokenCounts`: adds what the counts say to the logits, and counts the token that was read.

    Args:
        counts: the module.
        norm: the last normalization.
        logits: [B, N], of :func:`~mmrec.model.decode_rows.buffer`; changed in place.
    """

    def __init__(self, counts: TokenCounts, norm: NormStep, logits: Tensor) -> None:
        self.counts, rows = counts, len(logits)
        self.gates = buffer(rows, len(counts.half_lives))
        self.bias = counts.gate.bias.detach()
        self.open = product(counts.gate.weight.detach(), norm.normal, self.gates)
        self.logits, self.rows = logits.numpy(), range(rows)
        self.added = np.empty_like(self.logits[0])

    def set_state(self, state: LayerState) -> None:
        """Go on from ``state``, of B texts; it is not changed."""
        pending, totals = state
        self.totals = totals.clone()
        self.pending = [[token for token in row if token] for row in pending.tolist()]
        self.evidence = [self._evidence(row) for row in self.rows]

    def _evidence(self, row: int) -> np.ndarray:
        """Return what the counts of a text say, [R, N]."""
        found: np.ndarray = self.counts.evidence(self.totals[row, None, None])[0, 0].detach().numpy()
        return found

    def __call__(self, tokens: Sequence[int]) -> None:
        self.open()
        self.gates.add_(self.bias).sigmoid_().mul_(2)
        for row, token, gates in zip(self.rows, tokens, self.gates.tolist(), strict=True):
            for gate, evidence in zip(gates, self.evidence[row], strict=True):
                np.multiply(evidence, np.float32(gate), out=self.added)
                np.add(self.logits[row], self.added, out=self.logits[row])
            self.pending[row].append(token + 1)
            if len(self.pending[row]) == SPAN:
                self._end_span(row)

    def _end_span(self, row: int) -> None:
        """Count what was read of a text since the last span of it ended."""
        read = torch.tensor(self.pending[row], dtype=self.totals.dtype)
        self.totals[row] = self.counts.after_span(self.totals[row, None], read[None])[0]
        self.pending[row], self.evidence[row] = [], self._evidence(row)

    def state(self) -> LayerState:
        """Return a copy of the state after the last token."""
        pending = [row + [0] * (SPAN - len(row)) for row in self.pending]
        return torch.tensor(pending, dtype=self.totals.dtype), self.totals.clone()


STEPS: dict[type[RecurrentLayer], type[RecurrentStep]] = {
    RGLRU: RGLRUStep,
    GatedDeltaNet: GatedDeltaNetStep,
    PortableGatedDeltaNet: PortableStep,
}
"""The recurrent layers that have a step here; the others take :class:`ModuleStep`."""
