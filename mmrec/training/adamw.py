"""AdamW in a call of compiled code for all weights of a group, where there is such code."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from mmrec.model.ops import dispatch

KEPT = ("exp_avg", "exp_avg_sq", "step")
"""What torch's AdamW keeps of each weight."""
BY_TORCH_ALONE = ("amsgrad", "maximize", "capturable", "differentiable")


class CompiledAdamW(AdamW):
    """torch's AdamW with its options and its state, so that either continues what the other began.

    Where there are compiled kernels for all of its weights (:mod:`mmrec.model.ops.native.adamw`), they update them;
    elsewhere torch does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; ``closure`` is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated = [[weight for weight in group["params"] if weight.grad is not None] for group in self.param_groups]
        states = [[self.state[weight] for weight in weights] for weights in updated]
        kernels = self._kernels([*chain(*updated)], [*chain(*states)])
        if kernels is None:
            super().step()
            return loss
        for group, weights, kept in zip(self.param_groups, updated, states, strict=True):
            rule = kernels.Rule(group["lr"], group["weight_decay"], *group["betas"], group["eps"])
            parts = ([state[name] for state in kept] for name in KEPT)
            kernels.update(rule, weights, [weight.grad for weight in weights], *parts)
        return loss

    def _kernels(self, weights: list[Tensor], states: list[dict[str, Tensor]]) -> ModuleType | None:
        """Return the kernels that update ``weights``, if they take them; what is kept of each begins, then."""
        if any(group[name] for group in self.param_groups for name in BY_TORCH_ALONE):
            return None
        kept = [state[name] for state in states if state for name in KEPT]
        kernels = dispatch.native_adamw([*weights, *(weight.grad for weight in weights), *kept])
        if kernels is not None:
            for weight, state in zip(weights, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return kernels
