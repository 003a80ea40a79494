"""The steps that are recurrent layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import RMSNorm
from mmrec.model.ops.native.functions import LANES, SPAN, LongMemoryArguments, prepared
from mmrec.model.rg_lru import RGLRU
from mmrec.model.state import LayerState
from mmrec.model.without_autograd.buffers import Room
from mmrec.model.without_autograd.steps import Step, product


class MemoryStep(Step):
    """A recurrent layer.

    Its state is read from :attr:`past` [B, C - 1, channels] and :attr:`memory`, and is :attr:`past_after` and
    :attr:`memory_after` then.
    """

    memory: Tensor
    memory_after: Tensor
    scan: list[Callable[[], None]]
    scan_backward: list[Callable[[], None]]
    summed: tuple[Tensor, ...]
    """What the backward scan adds to, so that it is made zero before."""

    def __init__(self, room: Room, layer: RGLRU | GatedDeltaNet, norm: RMSNorm, x: Tensor) -> None:
        super().__init__(room, norm, x, layer.output.weight, x.shape[1])
        conv, projected = layer.conv, room.kept(layer.project.out_features)
        channels, width = conv.weight.shape
        self._weight, self.taps = conv.weight.detach(), torch.zeros(width, channels)
        self.to_taps = torch.zeros(room.rows, width, channels)
        # Writes the gradient of the convolution's weight where it is wanted.
        self._take_taps: Callable[[], None] | None = None
        if room.gradient(conv.weight) is not None:
            shape = room.rows, width, channels
            self._take_taps = prepared("sum_transposed", room.dtype, *shape, self.to_taps, room.address(conv.weight))
        self.past, self.past_after = torch.zeros(2, room.rows, width - 1, channels)
        self.to_past, self.to_past_after = torch.zeros(2, room.rows, width - 1, channels)
        self.projected, self.to_projected = projected, room.passing("to a map", projected.shape[1])
        self.project = product(room, layer.project.weight, self.norm.y, projected)

    def set_state(self, state: LayerState) -> None:
        """Read on from ``state``."""
        for mine, given in zip((self.past, self.memory), state, strict=True):
            mine.copy_(given)

    def state(self) -> LayerState:
        """Return a copy of the state after the last token."""
        return self.past_after.clone(), self.memory_after.clone()

    def refresh(self) -> None:
        """Take over what is computed from the weights alone."""
        self.taps.copy_(self._weight.t())

    def before_scan(self) -> None:
        """Compute what the scan reads beside what :attr:`project` has written."""

    @abstractmethod
    def after_scan_backward(self) -> None:
        """Bring the gradients that the backward scan wrote to the weights, and to :attr:`to_projected`."""

    def compute(self) -> None:
        self.project.forward()
        self.before_scan()
        for row in self.scan:
            row()

    def compute_backward(self) -> None:
        for each in self.summed:
            each.zero_()
        for row in self.scan_backward:
            row()
        if self._take_taps is not None:
            self._take_taps()
        self.after_scan_backward()
        self.project.backward(self.to_projected, self.norm.to_y)


class ShortStep(MemoryStep):
    """The "short" layer, :class:`mmrec.model.rg_lru.RGLRU`."""

    def __init__(self, room: Room, layer: RGLRU, norm: RMSNorm, x: Tensor) -> None:
        super().__init__(room, layer, norm, x)
        length, dim = room.length, x.shape[1]
        states = room.kept(dim, torch.float32)
        self.memory, self._to_memory = torch.zeros(2, room.rows, dim)
        self.memory_after = room.by_rows(states)[:, -1]
        self._layer, self._rate, self._to_rate = layer, torch.zeros(dim), torch.zeros(room.rows, dim)
        self._to_parameter = room.gradient(layer.rate)
        shared = self.taps, layer.r_bias.detach(), layer.i_bias.detach(), self._rate
        sizes = (length, dim, len(self.taps))
        rows = [room.by_rows(each) for each in (self.projected, self.inner, states)]
        back = [room.by_rows(each) for each in (self.to_inner, self.to_projected)]
        biases = room.by_row(layer.r_bias), room.by_row(layer.i_bias)
        self.scan, self.scan_backward = [], []
        self.summed = (self._to_memory,)
        for row in range(room.rows):
            x_of, y_of, states_of = (each[row] for each in rows)
            given = (x_of, self.past[row], self.memory[row], *shared, None)
            self.scan.append(
                prepared("short_memory", room.dtype, *sizes, *given, y_of, states_of, self.past_after[row])
            )
            found = (each[row] for each in (self.to_past, self._to_memory, self.to_taps, *biases, self._to_rate))
            grads = back[0][row], self.to_past_after[row], back[1][row]
            self.scan_backward.append(
                prepared("short_memory_backward", room.dtype, *sizes, *given, states_of, *grads, *found)
            )

    def refresh(self) -> None:
        super().refresh()
        self._rate.copy_(self._layer.decay_rate())

    def after_scan_backward(self) -> None:
        if self._to_parameter is not None:
            slope = self._layer.rate.detach().sigmoid().mul_(RGLRU.DECAY_SCALE)
            torch.mul(self._to_rate.sum(0), slope, out=self._to_parameter)


class LongStep(MemoryStep):
    """The "long" layer, :class:`mmrec.model.gated_deltanet.GatedDeltaNet`, and its form "portable"."""

    def __init__(self, room: Room, layer: GatedDeltaNet, norm: RMSNorm, x: Tensor) -> None:
        super().__init__(room, layer, norm, x)
        dim, heads = x.shape[1], layer.heads
        size = dim // heads
        self.memory, self.memory_after, self._to_memory = torch.zeros(3, room.rows, heads, size, size)
        of_gate = slice(3 * dim + 2 * heads, None)
        self._low, self._to_low = self.projected[:, of_gate], self.to_projected[:, of_gate]
        self._gate, self._to_gate = room.kept(dim), room.passing("to an output gate", dim)
        self._open = None if layer.gate is None else product(room, layer.gate.weight, self._low, self._gate)
        self._layer, self._rate = layer, torch.zeros(heads)
        self._to_rate, self._to_parameter = torch.zeros(room.rows, heads), room.gradient(layer.log_rate)
        no_bias = torch.zeros(heads)
        beta_bias = no_bias if layer.beta_bias is None else layer.beta_bias
        shared = (self.taps, self._rate, layer.decay_bias.detach(), beta_bias.detach(), layer.norm.weight.detach())
        form = LongMemoryArguments(
            *(room.length, heads, size, len(self.taps), layer.project.out_features, SPAN), *layer._form(),
            *(each.data_ptr() for each in shared),
        )  # fmt: skip
        kept = room.taken(room.rows, -(-room.length // SPAN), heads, size, -(-size // LANES) * LANES)
        of_bias, of_norm = (room.by_row(each) for each in (layer.decay_bias, layer.norm.weight))
        self._sums = self._to_rate, of_bias, room.by_row(beta_bias), of_norm
        self._alive = shared
        inputs = [room.by_rows(each) for each in (self.projected, self._gate)]
        back = [room.by_rows(each) for each in (self.to_inner, self.to_projected, self._to_gate)]
        outputs = room.by_rows(self.inner)
        self.scan, self.scan_backward = [], []
        self.summed = (self._to_memory, *self._sums)
        for row in range(room.rows):
            given = [form, *(each[row] for each in inputs), None]
            after = (each[row] for each in (self.past_after, self.memory_after, outputs, kept))
            self.scan.append(prepared("long_memory", room.dtype, *given, *after))
            found = (each[row] for each in (self.to_past, self._to_memory, self.to_taps, *self._sums))
            seen = back[0][row], self.past[row], kept[row], self.to_past_after[row]
            grads = back[1][row], back[2][row]
            self.scan_backward.append(prepared("long_memory_backward", room.dtype, *given, *seen, *grads, *found))

    def refresh(self) -> None:
        super().refresh()
        torch.exp(self._layer.log_rate.detach(), out=self._rate)

    def before_scan(self) -> None:
        if self._open is None:
            self._gate.copy_(self._low)
        else:
            self._open.forward()
        self.past_after.copy_(self.past)
        self.memory_after.copy_(self.memory)

    def after_scan_backward(self) -> None:
        if self._to_parameter is not None:
            torch.mul(self._to_rate.sum(0), self._rate, out=self._to_parameter)
        if self._open is None:
            self._to_low.copy_(self._to_gate)
        else:
            self._open.backward(self._to_gate, self._to_low)
