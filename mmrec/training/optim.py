"""Optimizers, Muon for the matrices and AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer

from mmrec.model import RecurrentLM
from mmrec.training.mtp import MTPHead
from mmrec.training.muon import BatchedMuon
from mmrec.training.options import OptimizerOptions

CLIP_EPSILON = 1e-6
"""What torch adds to a norm before it divides by it: a smaller norm by this is scaled by 1."""


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
        self.adopt_groups()

    def adopt_groups(self) -> None:
        """Make the members' groups those of this optimizer again: a member that loads a state gets new ones."""
        self.param_groups = [group for member in self.members for group in member.param_groups]


def member_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return the members of a :class:`CombinedOptimizer`, or the optimizer itself."""
    return list(optimizer.members) if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def split_parameters(
    model: RecurrentLM, mtp_head: MTPHead | None = None
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
    if mtp_head is not None:
        matrices.append(mtp_head.project.weight)
        rest.append(mtp_head.norm.weight)
    return matrices, embeddings, rest


def make_optimizer(model: RecurrentLM, options: OptimizerOptions, mtp_head: MTPHead | None = None) -> Optimizer:
    """Return the optimizer that ``options`` name.

    Muon (Jordan et al. 2024) orthogonalizes the momentum of the layers' matrices; its step is scaled to the
    size of AdamW's (Liu et al. 2025), so that one learning rate serves both. Decays, norms, biases and
    convolutions have no weight decay.

    Args:
        model: its parameters are updated.
        options: name, rate, weight decay and betas.
        mtp_head: is updated, too.
    """
    matrices, embeddings, rest = split_parameters(model, mtp_head)
    weight_decay, rate = options.weight_decay, options.learning_rate
    by_adamw = [{"params": embeddings, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if options.optimizer == "adamw":
        by_adamw.insert(0, {"params": matrices, "weight_decay": weight_decay})
        return AdamW(by_adamw, lr=rate, betas=options.betas)
    muon = BatchedMuon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    # One operation, where torch would make a dozen. Lightning clips no gradients of one that is fused and alone.
    fused = True if embeddings[0].device.type == "cpu" else None
    return CombinedOptimizer([muon, AdamW(by_adamw, lr=rate, betas=options.betas, fused=fused)])


def updated_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of ``optimizer``, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_to_norm(
    optimizer: Optimizer, norm: Tensor, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
) -> bool:
    """Scale the gradients that ``optimizer`` uses, whose ``norm`` is known, down to a norm of ``gradient_clip_val``.

    Returns:
        Whether it is done; not where something else than the norm is to be limited.
    """
    if not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
        return False
    if norm.device.type != "cpu" or not norm <= gradient_clip_val - CLIP_EPSILON:
        clip_grads_with_norm_(updated_parameters(optimizer), gradient_clip_val, norm)
    return True
