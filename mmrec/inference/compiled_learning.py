"""Learning from whole parts in buffers made once, without autograd, and by compiled code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmrec.checkpoints.learned import PART, LearnedWeights
from mmrec.inference import learning
from mmrec.inference.learning import LEARNING_RATES, LearningNet, PartRead, mixed
from mmrec.model import RecurrentLM
from mmrec.model.ops.native.learning import MixingRule, ParameterUpdate, UpdateRule, mix_part, update_parameters
from mmrec.model.without_autograd.fixed_length import FixedLengthPass, pass_dtype


class CompiledLearning:
    """Reads whole parts of a text, and learns from each; in roundings alone it differs from learning by torch.

    Args:
        net: the model, one of those of :func:`mmrec.model.without_autograd.fixed_length.has_fixed_length_pass`.
        weights: what learns; they change with each part.

    Attributes:
        gradients: of the parameters that learn, by their names, float32.
    """

    @torch.inference_mode(False)
    def __init__(self, net: RecurrentLM, weights: LearningNet) -> None:
        self._weights = weights
        self._logits = torch.zeros(2, PART + 1, len(net.head.weight))
        self.gradients = {name: torch.zeros(x.shape) for name, x in weights.parameters.items()}
        dtype = pass_dtype()
        self._untouched = FixedLengthPass(net, PART, self._logits[0, 1:], dtype=dtype)
        self._learning = FixedLengthPass(weights.net, PART, self._logits[1, 1:], self.gradients, dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, learned: LearnedWeights, tokens: Tensor) -> PartRead:
        """Read the ``tokens`` [T] of a whole part, and learn from it."""
        self._logits[:, 0] = learned.logits
        untouched = self._untouched.read(tokens, learned.untouched)
        state = self._learning.read(tokens, learned.state)
        part = mix_part(mixing_rule(), self._logits, tokens, learned.mix, learned.curvature)
        self._learning.differentiate(part.to_logits)
        difference, squares = self.update(learned)
        after = replace(
            learned,
            difference=difference,
            squares=squares,
            updates=learned.updates + 1,
            state=state,
            untouched=untouched,
            logits=self._logits[:, -1].clone(),
            tokens=tokens[:0],
            mix=part.mix,
            curvature=part.curvature,
        )
        return PartRead(after, state, mixed(after.logits, after.mix), part.mixture, part.scores)

    def update(self, learned: LearnedWeights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update the weights by :attr:`gradients`; return their difference and the means of squares after that."""
        difference = {name: torch.empty_like(x) for name, x in learned.difference.items()}
        squares = {name: torch.empty_like(x) for name, x in learned.squares.items()}
        parameters = []
        for name, weight in self._weights.parameters.items():
            means = [f"{name}.rows", f"{name}.columns"] if weight.dim() == 2 else [name]
            parameters.append(
                ParameterUpdate(
                    gradient=self.gradients[name],
                    trained=self._weights.trained[name],
                    difference=learned.difference[name],
                    squares=[learned.squares[each] for each in means],
                    weight=weight,
                    difference_after=difference[name],
                    squares_after=[squares[each] for each in means],
                )
            )
        is_sound = update_parameters(update_rule(learned, len(parameters)), parameters)
        return (difference, squares) if is_sound else (learned.difference, learned.squares)


def mixing_rule() -> MixingRule:
    """Return the rule by which the mixture's weights move."""
    return MixingRule(learning.MIX_BLOCK, learning.FORGETTING, learning.RIDGE, *learning.MIX_RANGE)


def update_rule(learned: LearnedWeights, parameters: int) -> UpdateRule:
    """Return the rule of the next update of so many ``parameters``."""
    return UpdateRule(
        count=parameters,
        rate=LEARNING_RATES[learned.form],
        keep=1 - learning.DECAY,
        one_minus_beta2=1 - learning.BETA2,
        correction=1 - learning.BETA2 ** (learned.updates + 1),
        largest_update=learning.LARGEST_UPDATE,
        largest_mean=learning.LARGEST_MEAN[learned.form],
        least_square=learning.LEAST_SQUARE,
        largest_square=learning.LARGEST_GRADIENT**2,
    )
