"""The gated delta rule by the kernels of flash-linear-attention (Yang and Zhang 2024), with their choices pinned.

The arguments and results are those of :func:`mmrec.model.ops.dispatch.gated_delta_rule`. Queries, keys and values
are multiplied in 16 bits, or, where they are float32, as TF32; the state, the decays and the writing strengths are
float32. A reset is a decay that leaves nothing, as in every other form.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from torch import Tensor
from triton.runtime.autotuner import Autotuner, Config

MODULES = "fla."
RECURRENT_TOKENS = 16
"""Up to so many tokens are read one by one where no gradient is wanted: exactly, in a single kernel."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    query_scale: float = 1.0,
    *,
    products: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.dispatch.gated_delta_rule` with q, k and v multiplied in the dtype ``products``.

    Results have the dtype of ``state``.
    """
    pin_choices()
    inputs = (q, k, v, log_decay, beta, state)
    is_short = q.shape[2] <= RECURRENT_TOKENS and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    )
    op = fused_recurrent_gated_delta_rule if is_short else chunk_gated_delta_rule
    dtype = torch.float32 if is_short else products
    with _on(q):
        outputs, after = op(
            *(x.to(dtype).transpose(1, 2).contiguous() for x in (q, k, v)),
            g=log_decay.float().transpose(1, 2).contiguous(),
            beta=beta.float().transpose(1, 2).contiguous(),
            scale=query_scale,
            use_qk_l2norm_in_kernel=True,
            initial_state=state.float().contiguous(),
            output_final_state=True,
        )
    return outputs.transpose(1, 2).to(state.dtype), after.to(state.dtype)


_pinned: set[int] = set()


def pin_choices() -> None:
    """Leave each kernel one form: the one that a rule takes, not the fastest of a trial.

    What an autotuner's clock chooses differs from run to run, and with it the last bits: a run that was resumed would
    not end as one that was not. The trials would take minutes, too.
    """
    for name, module in [*sys.modules.items()]:
        if name.startswith(MODULES) and id(module) not in _pinned:
            _pinned.add(id(module))
            for tuner in vars(module).values():
                while tuner is not None and not isinstance(tuner, Autotuner):
                    tuner = getattr(tuner, "fn", None)
                if isinstance(tuner, Autotuner):
                    tuner.configs = [min(tuner.configs, key=_order)]


def _order(config: Config) -> tuple[Any, ...]:
    """Order forms by what they take of a multiprocessor: few stages, about four warps, blocks of about 64."""
    blocks = sorted((str(name), value) for name, value in config.kwargs.items())
    sizes = sum(abs(value - 64) for _, value in blocks if isinstance(value, int) and not isinstance(value, bool))
    return abs(config.num_stages - 2), abs(config.num_warps - 4), sizes, str(blocks)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on the device of ``x``: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
