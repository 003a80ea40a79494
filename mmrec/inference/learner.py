"""Reads a text part by part by two models, the untouched one and one that learns from each whole part."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, cached_property

import torch
from torch import Tensor

from mmrec.checkpoints.learned import PART, LearnedWeights
from mmrec.inference.compiled_learning import CompiledLearning
from mmrec.inference.learning import LearningNet, PartRead, mix_part, mixed, updated_weights
from mmrec.inference.metrics import token_nll
from mmrec.model import RecurrentLM, State, detach_state
from mmrec.model.ops import dispatch
from mmrec.model.without_autograd.fixed_length import has_fixed_length_pass


class Learner:
    """Reads on from what was learned, and learns from what it reads.

    Args:
        net: the model; it is not changed.
        learned: what was learned before.

    Attributes:
        net: the model with the weights that it has learned.
    """

    def __init__(self, net: RecurrentLM, learned: LearnedWeights) -> None:
        self._untouched, self._weights = net, LearningNet(net, learned.form)
        self._weights.set_difference(learned.difference)
        self.net = self._weights.net

    def read(self, learned: LearnedWeights, tokens: Tensor) -> PartRead:
        """Read the ``tokens`` [T] of a part from its begin, and learn from them where the part is whole.

        Args:
            learned: at the begin of the part; what this has learned by now.
            tokens: int64, on the model's device.
        """
        is_whole = len(tokens) == PART
        if is_whole and learned.compiled and self._compiled is not None:
            return self._compiled.read(learned, tokens)
        with torch.set_grad_enabled(is_whole), kernels_of(learned):
            both, state, untouched = self._forward(learned, tokens)
            logits = both.detach()
            mixture, mix, curvature = mix_part(learned, logits[:, :-1], tokens)
            after = replace(learned, tokens=tokens)
            if is_whole:
                gradients = self._weights.gradients(token_nll(both[1, :-1], tokens, "mean"))
                difference, squares = updated_weights(learned, gradients)
                self._weights.set_difference(difference)
                after = replace(learned, difference=difference, squares=squares, updates=learned.updates + 1)
                after = replace(after, state=state, untouched=untouched, logits=logits[:, -1].clone())
                after = replace(after, tokens=tokens[:0], mix=mix, curvature=curvature)
            return PartRead(after, state, mixed(logits[:, -1], mix), mixture, logits)

    def at_the_end(self, learned: LearnedWeights) -> tuple[Tensor, State, Tensor]:
        """Return, after the part that was begun, both models' logits [2, N], the untouched one's state, the mix."""
        if not len(learned.tokens):
            return learned.logits, learned.untouched, learned.mix
        with kernels_of(learned):
            both, _, untouched = self._forward(learned, learned.tokens)
        _, mix, _ = mix_part(learned, both[:, :-1], learned.tokens)
        return both[:, -1], untouched, mix

    def _forward(self, learned: LearnedWeights, tokens: Tensor) -> tuple[Tensor, State, State]:
        """Read the tokens of a part from its begin by both models.

        Returns:
            Logits [2, T + 1, N], float32, of each token and of the one after them, of the untouched model and of the
            one that learns, the latter with a graph; the state after them of the one that learns; and of the other.
        """
        logits, state = self.net(tokens[None], _usable(learned.state))
        with torch.no_grad():
            untouched, untouched_state = self._untouched(tokens[None], _usable(learned.untouched))
        both = torch.cat([learned.logits[:, None].clone(), torch.cat([untouched, logits]).float()], dim=1)
        return both, detach_state(state), detach_state(untouched_state)

    @cached_property
    def _compiled(self) -> CompiledLearning | None:
        """What learns by compiled code; None where it cannot be used. That there are no kernels is said once."""
        if has_fixed_length_pass(self._untouched) and dispatch.has_native_learning():
            return CompiledLearning(self._untouched, self._weights)
        weight = self._untouched.embedding.weight
        if weight.device.type == "cpu" and not (dispatch.has_native(weight.dtype) and dispatch.has_native_learning()):
            _say_that_bits_differ()
        return None


@cache
def _say_that_bits_differ() -> None:
    """Say, once in a process, that a memory is not gone on with as it was begun."""
    problem = dispatch.native_problem(learning=True) or "MMREC_NATIVE=0"
    print(f"This memory was begun with compiled kernels; the last digits will differ: {problem}", file=sys.stderr)


def kernels_of(learned: LearnedWeights) -> AbstractContextManager[None]:
    """Compute, within, by kernels or by torch, as the memory was begun."""
    return nullcontext() if learned.compiled else dispatch.without_native()


def _usable(state: State) -> State:
    """Return a state that gradients can be computed from: made in inference mode, it must be copied."""
    return [
        (past.clone() if past.is_inference() else past, memory.clone() if memory.is_inference() else memory)
        for past, memory in state
    ]
