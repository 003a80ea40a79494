"""Models of an evaluation: this program's, and baselines with as many parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.baselines.models import GPT, LSTM, check_baseline, mamba2, mingru
from mmrec.core.errors import UserError, nearest
from mmrec.data.batches import IGNORE_INDEX
from mmrec.inference.metrics import token_nll
from mmrec.model import ModelConfig, RecurrentLM

OURS: dict[str, dict[str, Any]] = {"mmrec": {}, "mmrec-negative": {"negative_eigenvalues": True}}
"""The variants of our model: what each changes of a config."""
Build = Callable[[int, int, int, int], nn.Module]
"""Makes a model of (vocabulary, longest text in tokens, width, layers)."""

BASELINES: dict[str, Build] = {
    "gpt": lambda vocab_size, length, dim, layers: GPT(vocab_size, length, dim, layers),
    "lstm": lambda vocab_size, length, dim, layers: LSTM(vocab_size, dim, layers),
    "mingru": lambda vocab_size, length, dim, layers: mingru(vocab_size, dim, layers),
    "mamba2": lambda vocab_size, length, dim, layers: mamba2(vocab_size, dim, layers),
}
"""Baselines of an evaluation by name."""


def head_of(model: nn.Module) -> nn.Module:
    """Return the output layer of a model, ours or a baseline's."""
    inner = getattr(model, "model", model)
    for name in ("head", "to_logits", "lm_head"):
        if hasattr(inner, name):
            return inner.get_submodule(name)
    raise TypeError(f"{type(inner).__name__} has no output layer of a known name")


def layer_parameters(model: nn.Module) -> int:
    """Return the parameters without the tables of embeddings, positions and outputs, which grow with N."""
    tables = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    shared = {id(p) for p in (*tables, *head_of(model).parameters())}
    return sum(p.numel() for p in model.parameters() if id(p) not in shared)


def check_model(name: str) -> None:
    """Raise UserError where there is no model ``name``, or its package is missing."""
    known = [*OURS, *BASELINES]
    if name not in known:
        raise UserError(f"no model {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    if name in BASELINES:
        check_baseline(name)


def make_model(name: str, config: ModelConfig, vocab_size: int, length: int) -> nn.Module:
    """Return the model ``name``: ours of ``config``, or a baseline with as many layers and parameters in them.

    Args:
        name: of :data:`OURS` or :data:`BASELINES`.
        config: of our model.
        vocab_size: N.
        length: the longest text, in tokens; a GPT has positions for no more.

    Raises:
        UserError: there is no such model, or its package is missing.
    """
    check_model(name)
    if name in OURS:
        return RecurrentLM(replace(config, **OURS[name]), vocab_size)
    build = BASELINES[name]
    with torch.device("meta"):
        wanted = layer_parameters(RecurrentLM(config, 2))

        def distance(dim: int) -> int:
            return abs(layer_parameters(build(2, 2, dim, config.layers)) - wanted)

        dims = range(8, 3 * config.dim + 1, 4)
        best = min(dims, key=distance)
    return build(vocab_size, length, best, config.layers)


class SelectiveLogits(nn.Module):
    """A model that computes logits at target positions alone: of 8,192 tokens they would take most of the time.

    Args:
        model: tokens [B, T] and a state to logits and a state.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._mask: Tensor | None = None
        head_of(model).register_forward_pre_hook(self._select)

    def _select(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert self._mask is not None
        # One row of all target positions: what comes of it still has three dimensions, as the models expect.
        return (inputs[0][self._mask][None],)

    def forward(self, tokens: Tensor, targets: Tensor, state: object) -> tuple[Tensor, Tensor, object]:
        """Return logits [M, N] and targets [M] where ``targets`` [B, T] are scored, and the state after."""
        self._mask = targets != IGNORE_INDEX
        logits, state = self.model(tokens, state)
        return logits[0].float(), targets[self._mask], state

    def loss(self, tokens: Tensor, targets: Tensor, state: object) -> Tensor:
        """Return the mean loss of the scored positions, in nats."""
        logits, answers, _ = self(tokens, targets, state)
        return token_nll(logits, answers, "mean")
