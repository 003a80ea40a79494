"""The interface of a recurrent layer: a layer with a state of constant size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec.model.state import LayerState


class Gates(NamedTuple):
    """The gates of a recurrent layer, as they open for given inputs.

    Attributes:
        log_decay: [B, T, channels or heads], float32, natural logarithm of the decay at each token, at most 0.
        activations: by the name that the layer's paper gives them, [B, T, any], between 0 (shut) and 1 (open).
    """

    log_decay: Tensor
    activations: dict[str, Tensor]


class RecurrentLayer(nn.Module, ABC):
    """A layer with a state of constant size: (inputs [B, T, D], state) to (outputs [B, T, D], state)."""

    @abstractmethod
    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state before the first token of ``rows`` texts."""

    @abstractmethod
    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Read ``x`` [B, T, D] on from ``state``, zero before each token where ``reset_mask`` [B, T] is true."""

    @abstractmethod
    def gates(self, x: Tensor) -> Gates:
        """Return the gates that :meth:`forward` computes from ``x`` [B, T, D]."""
