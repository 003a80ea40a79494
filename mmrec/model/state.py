"""The state of a model: all that it knows of the tokens before, of constant size, in and out of every call."""

from __future__ import annotations

import torch
from torch import Tensor

LayerState = tuple[Tensor, Tensor]
"""Of one layer: the last C - 1 inputs of its convolution [B, C - 1, channels], and the state of its recurrence.

Of counts of tokens: :meth:`mmrec.model.token_counts.TokenCounts.zero_state`.
"""
State = list[LayerState]
"""Of a model: one entry a layer, and last one of the counts of tokens, where the model has such."""


def detach_state(state: State) -> State:
    """Return the state cut off from the graph that made it: the truncation of back-propagation in time."""
    return [(past.detach(), memory.detach()) for past, memory in state]


def state_to(state: State, device: torch.device) -> State:
    """Return the state on ``device``."""
    return [(past.to(device), memory.to(device)) for past, memory in state]


def reset_state_rows(state: State, reset_mask: Tensor) -> State:
    """Return the state with the rows where ``reset_mask`` [B] (bool) is true set to zero, as before any text."""

    def cleared(x: Tensor) -> Tensor:
        return x.masked_fill(reset_mask.view(-1, *[1] * (x.dim() - 1)), 0)

    return [(cleared(past), cleared(memory)) for past, memory in state]
