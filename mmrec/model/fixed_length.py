"""A pass over one row of a fixed number of tokens, and its gradients, in buffers made once and without autograd.

At the size of a laptop's models a pass of 128 tokens costs more for making tensors, for the graph and for the
arguments of kernels than for arithmetic. Here all of that is done once: every operation reads and writes a buffer of
its own, products are torch's, and what is between them is computed by the kernels of :mod:`mmrec.model.ops.native`,
which the model's own ``forward`` takes, too. float32, on a CPU. Legend of shapes as in :mod:`mmrec.model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import CausalConv, FeedForward, RMSNorm
from mmrec.model.lm import Block, RecurrentLM
from mmrec.model.ops import dispatch
from mmrec.model.ops.native.functions import LANES, SPAN, LongMemoryArguments, prepared
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.rg_lru import RGLRU, RGLRUProjection
from mmrec.model.state import LayerState, State

KNOWN = (
    *(RecurrentLM, Block, RMSNorm, RGLRU, GatedDeltaNet, PortableGatedDeltaNet, CausalConv, FeedForward),
    *(nn.ModuleList, nn.Linear, nn.Embedding, nn.Dropout),
)
"""The modules that a pass knows how to compute; with a subclass or a hook they may be something else."""


def has_fixed_length_pass(net: RecurrentLM) -> bool:
    """Return whether :class:`FixedLengthPass` can compute ``net``: its parts are known, and there are kernels."""
    return dispatch.has_native(torch.float32) and all(
        type(module) in KNOWN and not module._forward_hooks and not module._forward_pre_hooks
        for module in net.modules()
    ) and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in net.parameters())  # fmt: skip


class FixedLengthPass:
    """Reads rows of T tokens, one at a time, with the weights as they are then; and differentiates what it read.

    Args:
        net: the model, one of those of :func:`has_fixed_length_pass`. Its parameters stay where they are in memory.
        length: T.
        logits: [T, N], contiguous: where those after each token are written; a buffer of its own if None.
        gradients: by the name of a parameter, contiguous and of its shape: where its gradient is written. Parameters
            that have none here are not differentiated by.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        net: RecurrentLM,
        length: int,
        logits: Tensor | None = None,
        gradients: dict[str, Tensor] | None = None,
    ) -> None:
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        found = gradients or {}
        self._learns = bool(found)
        room = _Room(length, net.config.dim, {key: found[name] for key, name in names.items() if name in found})
        self._embedding, self._to_embedding = net.embedding.weight.detach(), room.gradient(net.embedding.weight)
        self._tokens = torch.zeros(length, dtype=torch.int64)
        self._x = x = room.kept(net.config.dim)
        self._steps: list[_Step] = []
        self._memories: list[_ShortStep | _LongStep] = []
        for block in net.blocks:
            assert isinstance(block, Block)
            normal = _Norm(room, block.memory_norm, x)
            kind = _ShortStep if isinstance(block.memory, RGLRU) else _LongStep
            memory = kind(room, block.memory, normal, x)  # type: ignore[arg-type]
            ffn = _FeedForwardStep(room, block.ffn, _Norm(room, block.ffn_norm, memory.after), memory.after)
            self._memories.append(memory)
            self._steps += [memory, ffn]
            x = ffn.after
        self._norm = _Norm(room, net.norm, x)
        self.logits = torch.zeros(length, len(net.head.weight)) if logits is None else logits
        self._head = _Product(room, net.head.weight, self._norm.y, self.logits)
        self._to_x, self._is_tied = room.to_x, net.head.weight is net.embedding.weight
        self._refresh()

    @torch.no_grad()
    def read(self, tokens: Tensor, state: State) -> State:
        """Read ``tokens`` [T] on from the state of one text; return the state after them.

        :attr:`logits` [T, N] are those after each token; the next call overwrites them.
        """
        if self._learns:
            self._refresh()
        self._tokens.copy_(tokens)
        torch.index_select(self._embedding, 0, self._tokens, out=self._x)
        for memory, before in zip(self._memories, state, strict=True):
            memory.set_state(before)
        for step in self._steps:
            step.forward()
        self._norm.forward()
        self._head.forward()
        return [memory.state() for memory in self._memories]

    @torch.no_grad()
    def differentiate(self, to_logits: Tensor) -> None:
        """Write the gradients of what was read last, whose gradient by :attr:`logits` is ``to_logits`` [T, N]."""
        to_hidden = self._norm.to_y
        self._head.backward(to_logits, to_hidden)
        self._to_x.zero_()
        self._norm.backward(self._to_x)
        for step in reversed(self._steps):
            step.backward()
        if self._to_embedding is not None:
            if not self._is_tied:  # else it holds the gradient of the head by now
                self._to_embedding.zero_()
            self._to_embedding.index_add_(0, self._tokens, self._to_x)

    def _refresh(self) -> None:
        """Take over what is computed from the weights alone."""
        for memory in self._memories:
            memory.refresh()


class _Room:
    """Makes the buffers of a pass.

    Attributes:
        length: T.
        to_x: [T, D], the gradient of the residual stream, at the place where the pass backwards is.
    """

    def __init__(self, length: int, dim: int, gradients: dict[int, Tensor]) -> None:
        self.length, self._gradients = length, gradients
        self._shared: dict[tuple[str, int], Tensor] = {}
        self.to_x = self.passing("to_x", dim)

    def kept(self, size: int) -> Tensor:
        """Return a buffer [T, size] for what the gradients need."""
        return torch.zeros(self.length, size)

    def passing(self, name: str, size: int) -> Tensor:
        """Return the buffer [T, size] that all of this name and size use, one after the other."""
        return self._shared.setdefault((name, size), torch.zeros(self.length, size))

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return where the gradient of ``parameter`` is written, if it is."""
        return self._gradients.get(id(parameter))

    def gradient_or_scratch(self, parameter: Tensor) -> Tensor:
        """Return where the gradient of ``parameter`` is written, or a buffer of its shape that nobody reads."""
        found = self.gradient(parameter)
        return torch.zeros_like(parameter) if found is None else found


class _Product:
    """A linear map: y [T, outputs] of x [T, inputs]."""

    def __init__(self, room: _Room, weight: Tensor, x: Tensor, y: Tensor) -> None:
        self._weight, self._turned = weight.detach(), weight.detach().t()
        self._x, self._y, self._grad = x, y, room.gradient(weight)

    def forward(self) -> None:
        torch.mm(self._x, self._turned, out=self._y)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """Write ``x`` plus y to ``out``, both [T, outputs]."""
        torch.addmm(x, self._x, self._turned, out=out)

    def backward(self, to_y: Tensor, to_x: Tensor) -> None:
        if self._grad is not None:
            torch.mm(to_y.t(), self._x, out=self._grad)
        torch.mm(to_y, self._weight, out=to_x)


class _Norm:
    """RMS norm of x [T, D] into y; ``to_y`` is where its gradient is expected."""

    def __init__(self, room: _Room, norm: RMSNorm, x: Tensor) -> None:
        length, dim = x.shape
        weight = norm.weight.detach()
        self.y, scale = room.kept(dim), torch.zeros(length)
        self.to_y, self._to_x = room.passing("to_y of a norm", dim), room.passing("to_x of a norm", dim)
        self.forward = prepared("rms_norm", length, dim, norm.EPSILON, x, weight, self.y, scale)
        to_weight = room.gradient_or_scratch(norm.weight)
        self._backward = prepared(
            "rms_norm_backward", length, dim, x, weight, scale, self.to_y, self._to_x, to_weight
        )

    def backward(self, to_stream: Tensor) -> None:
        """Add the gradient of x to that of the stream."""
        self._backward()
        to_stream.add_(self._to_x)


class _Step(ABC):
    """A branch of the residual stream x [T, D]: what it adds, and :attr:`after`, the stream behind it."""

    def __init__(self, room: _Room, norm: _Norm, x: Tensor) -> None:
        self.norm, self.x, self.after = norm, x, room.kept(x.shape[1])
        self.to_x = room.to_x

    @abstractmethod
    def forward(self) -> None: ...

    @abstractmethod
    def backward(self) -> None:
        """Bring the gradient of the stream from behind the branch to before it."""


class _FeedForwardStep(_Step):
    def __init__(self, room: _Room, ffn: FeedForward, norm: _Norm, x: Tensor) -> None:
        super().__init__(room, norm, x)
        length, inner = len(x), ffn.output.in_features
        projected, hidden = room.kept(2 * inner), room.kept(inner)
        self._to_projected, self._to_hidden = room.passing("to a map", 2 * inner), room.passing("of a map", inner)
        self._project = _Product(room, ffn.project.weight, norm.y, projected)
        self._output = _Product(room, ffn.output.weight, hidden, self.after)
        self._gate = prepared("swiglu", length, inner, projected, hidden)
        self._gate_backward = prepared(
            "swiglu_backward", length, inner, projected, self._to_hidden, self._to_projected
        )

    def forward(self) -> None:
        self.norm.forward()
        self._project.forward()
        self._gate()
        self._output.add_to(self.x, self.after)

    def backward(self) -> None:
        self._output.backward(self.to_x, self._to_hidden)
        self._gate_backward()
        self._project.backward(self._to_projected, self.norm.to_y)
        self.norm.backward(self.to_x)


class _MemoryStep(_Step):
    """A recurrent layer.

    Its state is read from :attr:`past` [C - 1, channels] and :attr:`memory`, and is :attr:`past_after` and
    :attr:`memory_after` then.
    """

    past: Tensor
    memory: Tensor
    past_after: Tensor
    memory_after: Tensor
    project: _Product
    output: _Product

    def __init__(self, room: _Room, conv: CausalConv, norm: _Norm, x: Tensor) -> None:
        super().__init__(room, norm, x)
        channels, width = conv.weight.shape
        self._weight, self.taps = conv.weight.detach(), torch.zeros(width, channels)
        self._to_weight, self.to_taps = room.gradient(conv.weight), torch.zeros(width, channels)
        self.past, self.past_after = torch.zeros(2, width - 1, channels)
        self.to_past, self.to_past_after = torch.zeros(2, width - 1, channels)

    def set_state(self, state: LayerState) -> None:
        """Read on from the state of one text."""
        for mine, given in zip((self.past, self.memory), state, strict=True):
            mine.copy_(given[0])

    def state(self) -> LayerState:
        """Return a copy of the state after the last token."""
        return self.past_after[None].clone(), self.memory_after[None].clone()

    def refresh(self) -> None:
        """Take over what is computed from the weights alone."""
        self.taps.copy_(self._weight.t())

    def take_taps(self) -> None:
        """Write the gradient of the convolution's weight where it is wanted."""
        if self._to_weight is not None:
            self._to_weight.copy_(self.to_taps.t())


class _ShortStep(_MemoryStep):
    def __init__(self, room: _Room, layer: RGLRU, norm: _Norm, x: Tensor) -> None:
        super().__init__(room, layer.conv, norm, x)
        length, dim = x.shape
        projected, y, states = room.kept(len(RGLRUProjection._fields) * dim), room.kept(dim), room.kept(dim)
        self.memory, self.memory_after, self._to_memory = torch.zeros(dim), states[-1], torch.zeros(dim)
        self.project = _Product(room, layer.project.weight, norm.y, projected)
        self.output = _Product(room, layer.output.weight, y, self.after)
        self._layer, self._rate, self._to_rate = layer, torch.zeros(dim), torch.zeros(dim)
        self._to_parameter = room.gradient(layer.rate)
        self._to_projected = room.passing("to a map", projected.shape[1])
        self._to_y = room.passing("of a map", dim)
        sizes = (length, dim, len(self.taps))
        given = (
            projected,
            self.past,
            self.memory,
            self.taps,
            layer.r_bias.detach(),
            layer.i_bias.detach(),
            self._rate,
        )
        self._scan = prepared("short_memory", *sizes, *given, None, y, states, self.past_after)
        self._scan_backward = prepared(
            "short_memory_backward", *sizes, *given, None, states, self._to_y, self.to_past_after,
            self._to_projected, self.to_past, self._to_memory, self.to_taps,
            room.gradient_or_scratch(layer.r_bias), room.gradient_or_scratch(layer.i_bias), self._to_rate,
        )  # fmt: skip

    def refresh(self) -> None:
        super().refresh()
        self._rate.copy_(self._layer.decay_rate())

    def forward(self) -> None:
        self.norm.forward()
        self.project.forward()
        self._scan()
        self.output.add_to(self.x, self.after)

    def backward(self) -> None:
        self.output.backward(self.to_x, self._to_y)
        self._to_memory.zero_()
        self._scan_backward()
        self.take_taps()
        if self._to_parameter is not None:
            slope = self._layer.rate.sigmoid().mul_(RGLRU.DECAY_SCALE)
            torch.mul(self._to_rate, slope, out=self._to_parameter)
        self.project.backward(self._to_projected, self.norm.to_y)
        self.norm.backward(self.to_x)


class _LongStep(_MemoryStep):
    def __init__(self, room: _Room, layer: GatedDeltaNet, norm: _Norm, x: Tensor) -> None:
        super().__init__(room, layer.conv, norm, x)
        length, dim = x.shape
        size = dim // layer.heads
        projected, y = room.kept(layer.project.out_features), room.kept(dim)
        self.memory, self.memory_after, self._to_memory = torch.zeros(3, layer.heads, size, size)
        self.project = _Product(room, layer.project.weight, norm.y, projected)
        self.output = _Product(room, layer.output.weight, y, self.after)
        self._to_projected = room.passing("to a map", projected.shape[1])
        self._to_y = room.passing("of a map", dim)
        of_gate = slice(3 * dim + 2 * layer.heads, None)
        self._low, self._to_low = projected[:, of_gate], self._to_projected[:, of_gate]
        self._gate, self._to_gate = room.kept(dim), room.passing("to an output gate", dim)
        self._open = None if layer.gate is None else _Product(room, layer.gate.weight, self._low, self._gate)
        self._layer, self._rate, self._to_rate = layer, torch.zeros(layer.heads), torch.zeros(layer.heads)
        self._to_parameter = room.gradient(layer.log_rate)
        no_bias = torch.zeros(layer.heads)
        biases = layer.decay_bias.detach(), no_bias if layer.beta_bias is None else layer.beta_bias.detach()
        shared = (self.taps, self._rate, *biases, layer.norm.weight.detach())
        form = LongMemoryArguments(
            *(length, layer.heads, size, len(self.taps), projected.shape[1], SPAN), *layer._form(),
            *(each.data_ptr() for each in shared),
        )  # fmt: skip
        kept = torch.zeros(-(-length // SPAN), layer.heads, size, -(-size // LANES) * LANES)
        self._scan = prepared(
            "long_memory", form, projected, self._gate, None, self.past_after, self.memory_after, y, kept
        )
        beta = room.gradient_or_scratch(no_bias if layer.beta_bias is None else layer.beta_bias)
        self._sums = (
            *(self._to_rate, room.gradient_or_scratch(layer.decay_bias), beta),
            room.gradient_or_scratch(layer.norm.weight),
        )
        self._scan_backward = prepared(
            "long_memory_backward", form, projected, self._gate, None, self._to_y, self.past, kept,
            self.to_past_after, self._to_projected, self._to_gate, self.to_past, self._to_memory, self.to_taps,
            *self._sums,
        )  # fmt: skip
        self._alive = shared

    def refresh(self) -> None:
        super().refresh()
        torch.exp(self._layer.log_rate.detach(), out=self._rate)

    def forward(self) -> None:
        self.norm.forward()
        self.project.forward()
        if self._open is None:
            self._gate.copy_(self._low)
        else:
            self._open.forward()
        self.past_after.copy_(self.past)
        self.memory_after.copy_(self.memory)
        self._scan()
        self.output.add_to(self.x, self.after)

    def backward(self) -> None:
        self.output.backward(self.to_x, self._to_y)
        for each in (self._to_memory, *self._sums):
            each.zero_()
        self._scan_backward()
        self.take_taps()
        if self._to_parameter is not None:
            torch.mul(self._to_rate, self._rate, out=self._to_parameter)
        if self._open is None:
            self._to_low.copy_(self._to_gate)
        else:
            self._open.backward(self._to_gate, self._to_low)
        self.project.backward(self._to_projected, self.norm.to_y)
        self.norm.backward(self.to_x)
