"""What goes on inside a model as it reads: how long each memory lasts, how much it holds, how far its gates open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model import RGLRU, GatedDeltaNet, RecurrentLM


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer did while it read a text.

    Attributes:
        kind: of its memory, "short" or "long".
        half_lives: tokens after which half of what was remembered is left, of each channel [D] of a short memory or
            each head [H] of a long one: ln 2 over the mean decay. What a long memory overwrites is not in it.
        state_norm: root mean square of the numbers in the memory, after the text.
        gates: root mean square of each kind of gate over tokens and channels: 0 is shut, 1 is open.
    """

    kind: str
    half_lives: Tensor
    state_norm: float
    gates: dict[str, float]


@torch.no_grad()
def layer_statistics(net: RecurrentLM, tokens: Tensor) -> list[LayerStatistics]:
    """Read tokens [T] from an empty memory, and return what each layer did. Draws no random numbers.

    The model is left as it was: in training or evaluation mode, without hooks.
    """
    memories = [block.get_submodule("memory") for block in net.blocks]
    projected: list[Tensor] = []

    def keep(module: nn.Module, given: Any, result: Tensor) -> None:
        projected.append(result[0].float())

    hooks = [memory.get_submodule("project").register_forward_hook(keep) for memory in memories]
    training = net.training
    net.eval()
    try:
        _, state = net(tokens[None], net.zero_state(1))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    found = []
    for kind, memory, inputs, (_, remembered) in zip(net.layer_types(), memories, projected, state, strict=True):
        decay, gates = GATES[kind](memory, inputs)
        half_lives = math.log(2) / decay.mean(0).clamp_min(1e-12)
        found.append(
            LayerStatistics(kind, half_lives, _norm(remembered), {name: _norm(x) for name, x in gates.items()})
        )
    return found


def _norm(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _short(memory: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert isinstance(memory, RGLRU)
    _, r, i, gate = inputs.chunk(4, dim=-1)
    forget = (r + memory.r_bias).sigmoid()
    gates = {"forget": forget, "input": (i + memory.i_bias).sigmoid(), "output": gate.sigmoid()}
    return memory.DECAY_SCALE * F.softplus(memory.rate) * forget, gates


def _long(memory: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    assert isinstance(memory, GatedDeltaNet)
    _, decay, beta, low = inputs.split(memory.splits, dim=-1)
    write = (beta + memory.beta_bias).sigmoid()
    gates = {"write": write, "output": memory.gate(low.to(memory.gate.weight.dtype)).sigmoid()}
    return memory.log_rate.exp() * F.softplus(decay + memory.decay_bias), gates


GATES: dict[str, Callable[[nn.Module, Tensor], tuple[Tensor, dict[str, Tensor]]]] = {"short": _short, "long": _long}
"""By kind of memory: from what its input map gave [T, any] to the decay in nats a token [T, channels], and gates."""
