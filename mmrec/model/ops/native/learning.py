"""Learning from a part of a text by compiled code; the torch form is in :mod:`mmrec.inference.learning`."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.model.ops.native.build import LEARNING
from mmrec.model.ops.native.functions import prepared


class MixingRule(Structure):
    """How a mixture's weights move: after how many tokens; what the curvature keeps; its ridge; their bounds."""

    _fields_ = [("block", c_int64), *((name, c_double) for name in ("forgetting", "ridge", "least", "most"))]


class UpdateRule(Structure):
    """The numbers of an update of weights: how many parameters there are, and the rule's, as learning.c has them."""

    _fields_ = [
        ("count", c_int64),
        *((name, c_float) for name in ("rate", "keep", "one_minus_beta2", "correction")),
        *((name, c_float) for name in ("largest_update", "largest_mean", "least_square", "largest_square")),
    ]


class MixedPart(NamedTuple):
    """What comes of a part of T tokens.

    Attributes:
        scores: [2, T + 1, N], log-probabilities of each token and of the one after them.
        mixture: [T, N], log-probabilities.
        to_logits: [T, N], gradient of the second model's mean loss by its logits after each token.
        mix: [2], the mixture's weights after the part.
        curvature: [2, 2], likewise.
    """

    scores: Tensor
    mixture: Tensor
    to_logits: Tensor
    mix: Tensor
    curvature: Tensor


def mix_part(rule: MixingRule, logits: Tensor, tokens: Tensor, mix: Tensor, curvature: Tensor) -> MixedPart:
    """Mix what two models predict of a part, as :func:`mmrec.inference.learning.mix_part` does.

    Args:
        rule: of the mixture's weights.
        logits: [2, T + 1, N], float32, of each token and of the one after them.
        tokens: [T], int64.
        mix: [2], float64, the mixture's weights before the part.
        curvature: [2, 2], float64.
    """
    _, after, size = logits.shape
    found = MixedPart(
        *(torch.empty_like(logits), logits.new_empty(after - 1, size), logits.new_empty(after - 1, size)),
        *(mix.clone(), curvature.clone()),
    )
    prepared(
        "learn_mixture",
        LEARNING, rule, after - 1, size, logits, tokens, found.mix, found.curvature, found.scores,
        found.mixture, found.to_logits,
    )()  # fmt: skip
    return found


class ParameterUpdate(NamedTuple):
    """A parameter that learns: what is known before an update, and where what comes after is written.

    All are float32, but for the differences, float16. The running means of squares are those of a matrix's rows and
    of its columns, or those of a vector's numbers.
    """

    gradient: Tensor
    trained: Tensor
    difference: Tensor
    squares: list[Tensor]
    weight: Tensor
    difference_after: Tensor
    squares_after: list[Tensor]

    def as_numbers(self) -> list[int]:
        """Return sizes and addresses in the order that learning.c has them in."""
        addresses = [each.data_ptr() for each in (self.gradient, self.trained, self.difference)]
        addresses += _two(self.squares)
        addresses += [self.weight.data_ptr(), self.difference_after.data_ptr(), *_two(self.squares_after)]
        rows, columns = self.gradient.shape if self.gradient.dim() == 2 else (len(self.gradient), 0)
        return [rows, columns, *addresses]


def _two(tensors: list[Tensor]) -> list[int]:
    addresses = [each.data_ptr() for each in tensors]
    return addresses if len(addresses) == 2 else [*addresses, 0]


def update_parameters(rule: UpdateRule, parameters: list[ParameterUpdate]) -> bool:
    """Update all parameters, as :func:`mmrec.inference.learning.updated_weights` does, and write their weights.

    Returns:
        False where a gradient is too large or not finite: then no weight is changed.
    """
    is_sound = torch.zeros(1, dtype=torch.int64)
    numbers = torch.tensor([number for each in parameters for number in each.as_numbers()])
    scales = torch.empty(max(each.gradient.shape[-1] for each in parameters))
    prepared("learn_update", LEARNING, rule, numbers, scales, is_sound)()
    return bool(is_sound)
