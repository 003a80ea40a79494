"""Training of any of the models: initial state, loss, and the one loop of updates that bench and evals share.

Legend of shapes as in :mod:`mmrec.model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmrec.baselines.models import GPT, LSTM
from mmrec.core.runtime import FULL, MIXED
from mmrec.inference.metrics import token_nll
from mmrec.model import Hidden, RecurrentLM, State, reset_state_rows
from mmrec.model.without_autograd.training_pass import hidden_in_training
from mmrec.training.mtp import MTPHead, mtp_targets, mtp_weight
from mmrec.training.optim import make_optimizer, updated_parameters
from mmrec.training.options import OptimizerOptions
from mmrec.training.schedule import learning_rate_share


@dataclass(frozen=True)
class Hyperparameters:
    """Hyper-parameters of one model's training.

    Args:
        batch_size: rows of a batch, B.
        seq_len: tokens of a row, T.
        learning_rate: its peak.
        weight_decay: of matrices; norms, biases and decays have none.
        warmup_steps: updates of linear warmup, before half a cosine.
        min_lr_ratio: learning rate at the end, as a share of the peak.
        mtp_loss_weight: weight of the multi-token prediction loss at the first update; our model alone has one.
        max_tokens: tokens to train on at most; the caller's budget if None.
    """

    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    min_lr_ratio: float = 0.05
    mtp_loss_weight: float = 0.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "seq_len", "max_tokens")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < (1 if field.name in at_least_one else 0):
                raise ValueError(f"{field.name} is {value}")

    def steps(self, tokens: int) -> int:
        """Return the number of updates that ``tokens``, or ``max_tokens``, are enough for."""
        return (self.max_tokens or tokens) // (self.batch_size * self.seq_len)


HYPERPARAMETERS: dict[str, Hyperparameters] = {
    "mmrec": Hyperparameters(seq_len=128, mtp_loss_weight=0.3),
    # nanoGPT's CPU preset: 12 windows of 64, chosen at random.
    "gpt": Hyperparameters(batch_size=12, seq_len=64, learning_rate=1e-3, warmup_steps=100, min_lr_ratio=0.1),
    "lstm": Hyperparameters(),
}
"""Hyper-parameters by model; the other baselines have the LSTM's, on windows chosen at random."""


def carries_state(model: nn.Module) -> bool:
    """Return whether ``model`` is trained and scored with its state carried from batch to batch."""
    return isinstance(model, RecurrentLM | LSTM)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the weights of ``model`` are on."""
    return next(model.parameters()).device


def initial_state(model: nn.Module, rows: int) -> Any:
    """Return the state of ``rows`` rows before any text: None for attention, else the zero state."""
    return None if isinstance(model, GPT) else model.zero_state(rows)  # type: ignore[operator]


def detach(state: Any) -> Any:
    """Return ``state``, of any nesting, without the graph that computed it."""
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, list | tuple):
        return type(state)(detach(part) for part in state)
    return state


def reset_rows(model: nn.Module, state: Any, reset_mask: Tensor) -> Any:
    """Return ``state`` with the rows where ``reset_mask`` [B] is true set to zero."""
    if isinstance(model, RecurrentLM):
        return reset_state_rows(state, reset_mask)
    return tuple(part.masked_fill(reset_mask[None, :, None], 0) for part in state)


def mean_nll(
    model: nn.Module, inputs: Tensor, targets: Tensor, state: Any, precision: str = FULL
) -> tuple[Tensor, Any]:
    """Return the mean negative log-likelihood in nats/token, and the state after the last token."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == MIXED):
        logits, state = model(inputs, state)
    return token_nll(logits, targets, "mean"), state


def make_baseline_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, mtp_head: MTPHead | None = None
) -> Optimizer:
    """Return Muon and AdamW for our model; for the others AdamW, without weight decay on vectors, as nanoGPT's."""
    if isinstance(model, RecurrentLM):
        options = OptimizerOptions(learning_rate=learning_rate, weight_decay=weight_decay)
        return make_optimizer(model, options, mtp_head)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)


class TrainingLoop:
    """Updates of one model: loss, backward pass, gradient clipping, optimizer, learning-rate schedule.

    Args:
        model: any of :mod:`mmrec.baselines.models`, or ours.
        hyperparameters: of the optimizer, the schedule and the multi-token prediction loss.
        total_steps: updates until the schedule ends; None for a constant learning rate after the warmup.
        precision: of the matrix products, Lightning's name.
        clip_by_group: whether the norm of the gradients is summed in the order of the optimizer's groups, not in the
            model's. It changes the last bit alone, and with it the figures of a seed that were measured before.
        as_fit: whether our model is computed as ``mmrec fit`` does, without autograd where that is possible. It
            changes the last digits, and so the figures that were measured before.
    """

    def __init__(
        self,
        model: nn.Module,
        hyperparameters: Hyperparameters,
        total_steps: int | None,
        precision: str = FULL,
        clip_by_group: bool = False,
        as_fit: bool = False,
    ) -> None:
        self._as_fit = as_fit and isinstance(model, RecurrentLM)
        self._hidden: Callable[[Tensor, Any], tuple[Hidden, State]] | None = None
        self.model, self.precision, self.step = model, precision, 0
        self._total_steps, self._mtp_loss_weight = total_steps, hyperparameters.mtp_loss_weight
        has_mtp = isinstance(model, RecurrentLM) and hyperparameters.mtp_loss_weight > 0
        self._mtp_head = MTPHead(model.config.dim) if isinstance(model, RecurrentLM) and has_mtp else None
        self._optimizer = make_baseline_optimizer(
            model, hyperparameters.learning_rate, hyperparameters.weight_decay, self._mtp_head
        )
        mtp_parameters = [] if self._mtp_head is None else [*self._mtp_head.parameters()]
        by_model: list[Tensor] = [*model.parameters(), *mtp_parameters]
        self._parameters = updated_parameters(self._optimizer) if clip_by_group else by_model
        schedule = OptimizerOptions(
            warmup_steps=hyperparameters.warmup_steps, min_lr_ratio=hyperparameters.min_lr_ratio
        )
        self._schedule = LambdaLR(self._optimizer, lambda step: learning_rate_share(step, schedule, total_steps))

    def loss(self, inputs: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the training loss of a batch [B, T] in nats/token, and the state after its last tokens."""
        if not isinstance(self.model, RecurrentLM) or not (self._as_fit or self._mtp_head):
            return mean_nll(self.model, inputs, targets, state, self.precision)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.precision == MIXED):
            if self._hidden is None:
                self._hidden = hidden_in_training(self.model) if self._as_fit else self.model.hidden
            hidden, state = self._hidden(inputs, state)
            logits = self.model.logits(hidden)
            if self._mtp_head is None:
                return token_nll(logits, targets, "mean"), state
            second = self.model.logits(hidden._replace(x=self._mtp_head(hidden.x)))
        weight = mtp_weight(self._mtp_loss_weight, self.step, self._total_steps)
        loss = token_nll(logits, targets, "mean") + weight * token_nll(second, mtp_targets(targets), "mean")
        return loss, state

    def update(self, loss: Tensor, average: Callable[[list[Tensor]], None] | None = None) -> None:
        """Make one update from ``loss``, with gradients clipped to norm 1, after ``average`` has averaged them."""
        self._optimizer.zero_grad()
        loss.backward()
        if average is not None:
            average(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
