"""How long an association outlives the decays of a long layer, and the associations that are written after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.model import GatedDeltaNet, RecurrentLM

WRITES = 128
"""Associations that are followed, evenly apart in the text."""


@torch.no_grad()
def retention(net: RecurrentLM, tokens: Tensor, distances: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Follow what the delta rule wrote at one token while it writes at those after it.

    What token s wrote is read by its own key k_s; of it ``k_s^T P k_s`` is left at token t, with P the product of
    ``a_i (I - b_i k_i k_i^T)`` over the tokens i from s + 1 to t. With a_i alone it is what the decays leave.

    Args:
        net: in evaluation mode.
        tokens: [T], more than the last distance.
        distances: in tokens, rising.

    Returns:
        By the number of a long layer's block and its head, such as "1.0": ``left`` and ``left_by_decay``, means over
        writes at each distance, and ``keys``: the participation ratio of the keys' second moment, between 1, where
        all keys are one direction, and K.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, (layer, x, past) in _inputs(net, tokens).items():
        parts = layer.split(layer.project(x))
        qkv, _ = layer.conv(parts.qkv, past)
        keys = layer.heads_of(qkv, torch.float32)[1][0]
        gates = layer.gates(x)
        decay, beta = gates.log_decay[0].mT.exp(), layer.beta_max * gates.activations["write"][0].mT
        left, by_decay = _follow(keys, decay, beta, distances)
        moment = torch.linalg.eigvalsh((keys.mT @ keys / keys.shape[1]).cpu())
        ratio = moment.sum(-1).square() / moment.square().sum(-1)
        for head in range(len(keys)):
            found[f"{number}.{head}"] = {
                "left": left[:, head].tolist(),
                "left_by_decay": by_decay[:, head].tolist(),
                "keys": float(ratio[head]),
            }
    return found


def _inputs(net: RecurrentLM, tokens: Tensor) -> dict[int, tuple[GatedDeltaNet, Tensor, Tensor]]:
    """Read tokens [T] from the zero state; return by block each long layer, its inputs and its convolution's past."""
    found: dict[int, tuple[GatedDeltaNet, Tensor, Tensor]] = {}
    layers = {
        number: layer for number, layer in enumerate(net.recurrent_layers()) if isinstance(layer, GatedDeltaNet)
    }

    def keep(number: int, layer: GatedDeltaNet) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            found[number] = (layer, given[0], given[1][0])

        return hook

    hooks = [layer.register_forward_pre_hook(keep(number, layer)) for number, layer in layers.items()]
    try:
        net(tokens[None].to(net.embedding.weight.device), net.zero_state(1))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _follow(keys: Tensor, decay: Tensor, beta: Tensor, distances: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what is left after each distance, and what the decays alone leave, [distances, H] both.

    Args:
        keys: [H, T, K].
        decay: [H, T].
        beta: [H, T].
        distances: rising.
    """
    last = keys.shape[1] - distances[-1]
    starts = torch.linspace(0, last - 1, min(WRITES, last)).long().to(keys.device)
    written = keys[:, starts]
    now, kept = written.clone(), torch.ones_like(decay[:, starts])
    left, by_decay = [], []
    for distance in range(1, distances[-1] + 1):
        at = starts + distance
        key, a, b = keys[:, at], decay[:, at], beta[:, at]
        now = a.unsqueeze(-1) * (now - (b * (key * now).sum(-1)).unsqueeze(-1) * key)
        kept = kept * a
        if distance in distances:
            left.append((now * written).sum(-1).mean(1))
            by_decay.append(kept.mean(1))
    return torch.stack(left), torch.stack(by_decay)
