"""Statistics of the recurrent layers on a text: half-lives, norms of the states, and how far the gates open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.model.lm import RecurrentLM


@dataclass(frozen=True)
class LayerStatistics:
    """What a recurrent layer did while it read a text.

    Attributes:
        kind: its name in the config's ``layer_types``.
        half_lives: tokens after which half of the state is left, of each channel [D] of an RG-LRU or each head [H] of
            a Gated DeltaNet: ln 2 over the mean decay. What the delta rule overwrites is not in it.
        state_norm: root mean square of the recurrent state after the text.
        gates: root mean square of each gate over tokens and channels: 0 is shut, 1 is open.
    """

    kind: str
    half_lives: Tensor
    state_norm: float
    gates: dict[str, float]


@torch.no_grad()
def layer_statistics(net: RecurrentLM, tokens: Tensor) -> list[LayerStatistics]:
    """Read tokens [T] from the zero state, and return the statistics of each recurrent layer.

    Draws no random numbers. The model is left as it was: in training or evaluation mode, without hooks.
    """
    layers = net.recurrent_layers()
    inputs: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append(given[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    training = net.training
    net.eval()
    try:
        _, state = net(tokens[None], net.zero_state(1))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    found = []
    for kind, layer, x, (_, recurrent) in zip(net.layer_types(), layers, inputs, state[: len(layers)], strict=True):
        gates = layer.gates(x)
        half_lives = math.log(2) / (-gates.log_decay[0].mean(0)).clamp_min(1e-12)
        opened = {name: _rms(gate) for name, gate in gates.activations.items()}
        found.append(LayerStatistics(kind, half_lives, _rms(recurrent), opened))
    return found


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
