"""Learning from what is read: each part of a text changes the weights after it was predicted.

Dynamic evaluation (Krause et al. 2018, 2019), with three differences. Squared gradients are averaged as they come, so
that no pass over the training text is needed, and of a matrix by rows and columns alone (Adafactor). The rate is one
that foreign text wants, and what is predicted is a mixture with the model as it was trained: a product of powers of
the two distributions, whose weights follow the loss by Newton's method. On text of the training's kind, where the
difference is mostly noise, the mixture takes a part of it; on text unlike what was learned, none.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec.checkpoints.learned import Form, LearnedWeights, learned_parameters
from mmrec.model import RecurrentLM, State

LEARNING_RATES: dict[Form, float] = {"full": 4.5e-4, "small": 4e-3}
"""Size of an update where the gradient is as large as it has been on average; fewer weights go further."""
DECAY = 3e-4
"""Share of the way back to the trained weights that every update goes. A weight that nothing moves may stay where it
is: float16 rounds such a step to none."""
BETA2 = 0.9925
"""Of the average of squared gradients."""
LARGEST_UPDATE = 10.0
"""Of a weight, in learning rates. Over :data:`DECAY` they bound the difference, whatever is read: that is below
:data:`mmrec.checkpoints.learned.LARGEST_DIFFERENCE`."""
LARGEST_MEAN: dict[Form, float] = {"full": 3.0, "small": math.inf}
"""Of the root of a parameter's mean squared update, in learning rates (Adafactor's clipping): a part unlike all
before it, as a line of one character is, takes the weights no further. The small form loses by such a bound."""
LEAST_SQUARE, LARGEST_GRADIENT = 1e-30, 1e12
"""Added to a squared gradient, so that no mean is 0; and what is too large to learn from: its square overflows."""
MIX_BLOCK = 16
"""Tokens after which the mixture's weights change; a divisor of a part."""
FORGETTING = 0.9
"""Share of the mixture's curvature that a block leaves to the next."""
RIDGE = 16.0
"""Added to that curvature: without it the first steps, on few tokens, would go too far."""
MIX_RANGE = (-0.5, 1.5)
"""Of the mixture's weights."""


class PartRead(NamedTuple):
    """A part of a text, or its begin, that was read.

    Attributes:
        learned: after it; what its weights are from now on.
        state: of the model that learns, after the last token.
        expected: [N], logits of the next token.
        mixture: [T, N], logits that predicted each token.
        logits: [2, T + 1, N], of each token and of the one after them, by the untouched model and by the one that
            learns.
    """

    learned: LearnedWeights
    state: State
    expected: Tensor
    mixture: Tensor
    logits: Tensor


class LearningNet:
    """A copy of a model whose weights are the trained ones and a difference; those that never learn are shared.

    Args:
        net: the model; it is not changed.
        form: which weights learn.

    Attributes:
        net: the copy.
        parameters: those of it that learn, by their names.
        trained: what they are without the difference.
    """

    @torch.inference_mode(False)  # what is made in it has no gradients
    def __init__(self, net: RecurrentLM, form: Form) -> None:
        trained = learned_parameters(net, form)
        self.trained = {name: parameter.detach() for name, parameter in trained.items()}
        memo: dict[int, object] = {}
        for parameter in net.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in trained.values():
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone())
        self.net: RecurrentLM = copy.deepcopy(net, memo).eval()
        self.parameters = learned_parameters(self.net, form)

    @torch.no_grad()
    def set_difference(self, difference: dict[str, Tensor]) -> None:
        """Make the weights the trained ones and ``difference``."""
        for name, parameter in self.parameters.items():
            torch.add(self.trained[name], difference[name].to(parameter.dtype), out=parameter.detach())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradient of ``loss`` by each parameter that learns, in float32."""
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
            for (name, parameter), gradient in zip(self.parameters.items(), found, strict=True)
        }


def updated_weights(
    learned: LearnedWeights, gradients: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the difference and the running means of squared gradients after one more update.

    A gradient that is not finite, or beyond :data:`LARGEST_GRADIENT`, changes nothing.
    """
    rate, keep, bound = LEARNING_RATES[learned.form], 1 - DECAY, LARGEST_MEAN[learned.form]
    correction = 1 - BETA2 ** (learned.updates + 1)
    difference: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        if gradient.dim() == 2:
            update = _factored_update(name, gradient, learned.squares, squares, correction)
        else:
            squares[name] = torch.lerp(learned.squares[name], gradient.square().add_(LEAST_SQUARE), 1 - BETA2)
            update = gradient * (squares[name] / correction).rsqrt_()
        mean = update.square().mean().sqrt_()
        update.div_((mean / bound).clamp_min_(1)).clamp_(-LARGEST_UPDATE, LARGEST_UPDATE)
        moved = (learned.difference[name].float() * keep).sub_(update, alpha=rate * keep)
        difference[name] = moved.half()
    if not all(bool((square < LARGEST_GRADIENT**2).all()) for square in squares.values()):
        return learned.difference, learned.squares
    return difference, squares


def _factored_update(
    name: str, gradient: Tensor, before: dict[str, Tensor], after: dict[str, Tensor], correction: float
) -> Tensor:
    """Return the gradient of a matrix over the root of its mean square, and put the new means into ``after``."""
    square = gradient.square()

    def mean_square(part: str, dim: int) -> Tensor:
        key = f"{name}.{part}"
        after[key] = torch.lerp(before[key], square.mean(dim, keepdim=True).add_(LEAST_SQUARE), 1 - BETA2)
        return after[key]

    rows, columns = mean_square("rows", 1), mean_square("columns", 0)
    return (gradient * (rows / rows.mean()).rsqrt_()).mul_((columns / correction).rsqrt_())


def mix_part(learned: LearnedWeights, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the predictions of a part, or of its begin, and move the mixture's weights on by what it says.

    The weights change after every :data:`MIX_BLOCK` tokens, by a Newton step on those tokens.

    Args:
        learned: with the weights at the begin of the part.
        logits: [2, T, N], float32, that predict each token: of the untouched model and of the one that learns.
        tokens: [T] of the part from its begin.

    Returns:
        The logits of the mixture [T, N]; its weights [2] and their curvature [2, 2] after the last whole block.
    """
    mix, curvature = learned.mix, learned.curvature
    scores, parts = logits.log_softmax(-1), []
    for begin in range(0, len(tokens), MIX_BLOCK):
        block, targets = scores[:, begin : begin + MIX_BLOCK], tokens[begin : begin + MIX_BLOCK]
        parts.append(mixed(block, mix))
        if len(targets) == MIX_BLOCK:
            mix, curvature = _newton_step(mix, curvature, block, targets)
    return torch.cat(parts), mix, curvature


def _newton_step(mix: Tensor, curvature: Tensor, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mixture's weights and curvature after a block of log-probabilities ``scores`` [2, T, N]."""
    probabilities = mixed(scores, mix).softmax(-1)
    mean = (probabilities * scores).sum(-1)
    own = scores.gather(-1, targets.expand(len(scores), -1).unsqueeze(-1)).squeeze(-1)
    gradient = (own - mean).sum(-1).cpu().double()
    apart = scores - mean.unsqueeze(-1)
    bend = torch.einsum("tn,itn,jtn->ij", probabilities, apart, apart).cpu().double()
    curvature = FORGETTING * curvature + bend
    step = torch.linalg.solve(curvature + RIDGE * torch.eye(2, dtype=torch.float64), gradient)
    moved = (mix + step).clamp(*MIX_RANGE)
    return (moved, curvature) if bool(moved.isfinite().all()) else (mix, curvature * 0)


def mixed(logits: Tensor, mix: Tensor) -> Tensor:
    """Return the logits [..., N] of the mixture of two models: a product of powers of their distributions.

    Args:
        logits: [2, ..., N].
        mix: [2], the powers.
    """
    return torch.einsum("k,k...->...", mix.to(logits.dtype).to(logits.device), logits)
