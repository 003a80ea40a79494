"""What is updated how: Muon for the matrices, AdamW for the rest, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from mmrec.model import RecurrentLM
from mmrec.training.mtp import MTPHead


class CombinedOptimizer(Optimizer):
    """Several optimizers that step as one, so that schedules, clipping and checkpoints see a single one.

    The parameter groups are those of the members, the same objects: setting a rate here sets it there.
    """

    def __init__(self, members: Iterable[Optimizer]) -> None:
        self.members = list(members)
        super().__init__([group for member in self.members for group in member.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every member; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the members' states in their order."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self.param_groups = [group for member in self.members for group in member.param_groups]


def split_parameters(
    model: RecurrentLM, second: MTPHead | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the matrices of the layers, the embeddings, and the rest (norms, decays, biases, convolutions)."""
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    rest: list[Tensor] = []
    inner = {id(weight) for weight in model.matrices()}
    outer = {id(m.weight) for m in (model.embedding, model.head)}
    for parameter in model.parameters():
        kind = matrices if id(parameter) in inner else embeddings if id(parameter) in outer else rest
        kind.append(parameter)
    if second is not None:
        matrices.append(second.project.weight)
        rest.append(second.norm.weight)
    return matrices, embeddings, rest


def make_optimizer(
    model: RecurrentLM,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    second: MTPHead | None = None,
) -> Optimizer:
    """Return the optimizer ``name``, "muon" or "adamw".

    Muon (Jordan et al. 2024) orthogonalizes the momentum of the layers' matrices; its step is scaled to the
    size of AdamW's (Liu et al. 2025), so that one learning rate serves both. Decays, norms, biases and
    convolutions have no weight decay.
    """
    matrices, embeddings, rest = split_parameters(model, second)
    by_adamw = [{"params": embeddings, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if name == "adamw":
        by_adamw.insert(0, {"params": matrices, "weight_decay": weight_decay})
        return AdamW(by_adamw, lr=learning_rate, betas=betas)
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return CombinedOptimizer([muon, AdamW(by_adamw, lr=learning_rate, betas=betas)])


def warmup_cosine(step: int, warmup_steps: int, total_steps: int | None, min_lr_ratio: float) -> float:
    """Return the share of the learning rate for update ``step`` (from 0).

    Linear from ``1 / warmup_steps`` to 1, then half a cosine down to ``min_lr_ratio`` at ``total_steps``; where that
    is None, because nobody knows when training ends, it stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
