"""One update of any of the models: its loss, its optimizer, and the state that it is carried on from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mmrec.baselines.models import GPT
from mmrec.core.precision import FULL, MIXED
from mmrec.inference.metrics import token_nll
from mmrec.model import RecurrentLM, reset_state_rows
from mmrec.training.mtp import MTPHead, mtp_targets
from mmrec.training.optim import make_optimizer

RECIPES: dict[str, dict[str, float]] = {
    "mmrec": {
        "rows": 8,
        "length": 128,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup": 50,
        "final": 0.05,
        "mtp_loss_weight": 0.3,
    },
    # nanoGPT's CPU preset: 12 windows of 64, chosen at random.
    "gpt": {"rows": 12, "length": 64, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup": 100, "final": 0.1},
    "lstm": {"rows": 8, "length": 256, "learning_rate": 3e-3, "weight_decay": 0.1, "warmup": 50, "final": 0.05},
}
"""How each learns; the others as the LSTM, but on windows chosen at random."""


def detached(state: Any) -> Any:
    """Return ``state``, of any nesting, cut off from the graph that made it."""
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, list | tuple):
        return type(state)(detached(part) for part in state)
    return state


def reset_rows(model: nn.Module, state: Any, reset_mask: Tensor) -> Any:
    """Return ``state`` with the rows where ``reset_mask`` [B] is true as before any text."""
    if isinstance(model, RecurrentLM):
        return reset_state_rows(state, reset_mask)
    return tuple(part.masked_fill(reset_mask[None, :, None], 0) for part in state)


def loss_of(
    model: nn.Module, inputs: Tensor, targets: Tensor, state: Any, precision: str = FULL
) -> tuple[Tensor, Any]:
    """Return the mean loss in nats/token, and the state after the last token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == MIXED):
        logits, state = model(inputs, state)
    return token_nll(logits, targets, "mean"), state


def loss_with_second(
    model: RecurrentLM, second: MTPHead, weight: float, inputs: Tensor, targets: Tensor, state: Any, precision: str
) -> tuple[Tensor, Any]:
    """Return the mean loss plus ``weight`` times that of the tokens after the targets, and the state at the end."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == MIXED):
        hidden, state = model.hidden(inputs, state)
        logits, ahead = model.head(hidden), model.head(second(hidden))
    return token_nll(logits, targets, "mean") + weight * token_nll(ahead, mtp_targets(targets), "mean"), state


def optimizer_of(
    model: nn.Module, learning_rate: float, weight_decay: float, second: MTPHead | None = None
) -> Optimizer:
    """Ours for our model; AdamW on the others, without weight decay on vectors, as nanoGPT does."""
    if isinstance(model, RecurrentLM):
        return make_optimizer(model, "muon", learning_rate, weight_decay, (0.9, 0.99), second)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)


def start(model: nn.Module, rows: int) -> Any:
    """Return what training starts to read from: nothing for attention, else the zero state."""
    return None if isinstance(model, GPT) else model.zero_state(rows)  # type: ignore[operator]
