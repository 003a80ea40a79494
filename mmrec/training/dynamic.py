"""Dynamic evaluation: a model that goes on learning from the text that it is scored on, never ahead of its score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DYNAMIC_LENGTH = 128
"""Tokens that are scored at a time, and then learned from."""


class DynamicEvaluation:
    """Updates the weights after each part of a text was scored, and puts them back at the end.

    The update is Adam's without its first average, pulled back towards the trained weights (Krause et al. 2018,
    "Dynamic Evaluation of Neural Sequence Models", with the squared gradients averaged as they come, so that no pass
    over the training text is needed).

    Args:
        model: its parameters are changed in place until :meth:`restore`.
        learning_rate: size of an update, where the gradient is as large as it has been on average.
        decay: share of the way back to the trained weights that every update goes.
        beta2: of the average of squared gradients.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float = 1e-4, decay: float = 1e-3, beta2: float = 0.99
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = [parameter.detach().clone() for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.learning_rate = learning_rate
        self.decay = decay
        self.beta2 = beta2
        self.updates = 0

    def learn(self, loss: Tensor) -> None:
        """Make one update that lowers ``loss``, the mean over what was scored, in nats/token."""
        gradients = torch.autograd.grad(loss, self.parameters)
        self.updates += 1
        correction = 1 - self.beta2**self.updates
        with torch.no_grad():
            for parameter, trained, square, gradient in zip(
                self.parameters, self.trained, self.squares, gradients, strict=True
            ):
                square.lerp_(gradient.square(), 1 - self.beta2)
                parameter.addcdiv_(gradient, (square / correction).sqrt_().add_(1e-8), value=-self.learning_rate)
                parameter.lerp_(trained, self.decay)

    def restore(self) -> None:
        """Put the trained weights back."""
        with torch.no_grad():
            for parameter, trained in zip(self.parameters, self.trained, strict=True):
                parameter.copy_(trained)
