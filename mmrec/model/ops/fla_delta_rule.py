"""The gated delta rule by the kernels of flash-linear-attention (Yang and Zhang 2024), with their choices pinned.

The arguments and results are those of :func:`mmrec.model.ops.dispatch.conv_gated_delta_rule`. Queries, keys and
values are multiplied in 16 bits, or, where they are float32, as TF32; the state, the decays and the writing strengths
are float32. A reset is a decay that leaves nothing, as in every other form.

For the backward pass the op keeps what the convolution reads, the inverse of each chunk's triangle, and the gates:
8.3 bytes a token and channel in 16 bits, at heads of 64. The convolution, the lengths of queries and keys, and the
states between chunks are computed once more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.autotuner import Autotuner, Config

from mmrec.model.ops import triton_conv
from mmrec.model.ops.launch import as_bytes, on_device, with_channels_together
from mmrec.model.ops.triton_conv import Convolution

MODULES = "fla."
PACKAGES = ("fla", "fla.ops", "fla.modules", "fla.modules.norm")
"""Whose ``__init__`` imports everything: every op, every layer and, with transformers, every model."""


@contextmanager
def _without_all_of_it() -> Iterator[None]:
    """Import modules of flash-linear-attention alone, not all that is beside them: a quarter of the time.

    Its packages are left to be imported whole by whoever wants them.
    """
    spec = None if "fla" in sys.modules else find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        yield
        return
    for name in PACKAGES:
        package: Any = ModuleType(name)
        package.__path__ = [str(Path(place, *name.split(".")[1:])) for place in spec.submodule_search_locations]
        package.__version__ = metadata.version("fla-core")
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in PACKAGES:
            del sys.modules[name]


with _without_all_of_it():
    from fla.modules.norm.l2norm import l2norm_bwd, l2norm_fwd
    from fla.ops.gated_delta_rule.chunk import (
        chunk_gated_delta_rule_bwd,
        chunk_gated_delta_rule_fwd,
    )
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule

RECURRENT_TOKENS = 16
"""Up to so many tokens are read one by one where no gradient is wanted: exactly, in a single kernel."""


class _ConvDeltaRule(torch.autograd.Function):
    """Of the scale of queries, what the convolution reads, its past, weight and resets, the gates, and the state."""

    @staticmethod
    def forward(ctx: Any, scale: float, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, past, weight, reset, log_decay, beta, state = inputs
        given = Convolution(x, past, weight, reset, silu=True, parts=3)
        (q, k, v, _, _), after = _queries(given, state.shape[1])
        with on_device(x):
            # What it names g is the sum of the logarithms from the start of each chunk, A the inverse of a triangle.
            sums, outputs, inverse, memory, _, _ = chunk_gated_delta_rule_fwd(
                q, k, v, log_decay, beta, scale=scale, initial_state=state, output_final_state=True
            )
        ctx.save_for_backward(x, past, weight, reset, sums, beta, inverse, state)
        ctx.scale = scale
        return outputs, memory, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        x, past, weight, reset, sums, beta, inverse, state = ctx.saved_tensors
        given = Convolution(x, past, weight, reset, silu=True, parts=3)
        (q, k, v, q_scale, k_scale), _ = _queries(given, state.shape[1])
        with on_device(x):
            to_q, to_k, to_v, to_beta, to_decay, to_state, _, _ = chunk_gated_delta_rule_bwd(
                *(q, k, v, sums, beta, inverse),
                scale=ctx.scale,
                initial_state=state,
                do=grad.contiguous(),
                dht=grad_state.contiguous(),
            )
            to_q, to_k = l2norm_bwd(q, q_scale, to_q), l2norm_bwd(k, k_scale, to_k)
        to_qkv = torch.stack([to_q, to_k, to_v.to(to_q.dtype)])
        to_x, to_past, to_weight = triton_conv.backward(given, to_qkv, grad_after)
        return None, to_x, to_past, to_weight, None, to_decay, to_beta.to(beta.dtype), to_state


def _queries(given: Convolution, heads: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return queries, keys and values [B, T, H, K], and what brought the first two to length 1; the past."""
    qkv, after = triton_conv.forward(given)
    q, k, v = qkv.unflatten(-1, (heads, -1)).unbind(0)
    with on_device(qkv):
        (q, q_scale), (k, k_scale) = l2norm_fwd(q), l2norm_fwd(k)
    return (q, k, v, q_scale, k_scale), after


def conv_gated_delta_rule(
    qkv: Tensor,
    conv: tuple[Tensor, Tensor],
    gates: tuple[Tensor, Tensor],
    state: Tensor,
    query_scale: float = 1.0,
    reset_mask: Tensor | None = None,
    *,
    products: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmrec.model.ops.dispatch.conv_gated_delta_rule` with all multiplied in the dtype ``products``.

    The outputs [B, T, H, V] have that dtype.
    """
    pin_choices()
    past, weight = conv[0].contiguous(), conv[1].float().contiguous()
    log_decay, beta = (x.contiguous() for x in gates)
    given = Convolution(with_channels_together(qkv), past, weight, as_bytes(reset_mask), silu=True, parts=3)
    inputs = (given.x, past, weight, log_decay, beta, state)
    if qkv.shape[1] > RECURRENT_TOKENS or _wants_gradient(inputs):
        x = with_channels_together(qkv.to(products))
        outputs: tuple[Tensor, Tensor, Tensor] = _ConvDeltaRule.apply(
            query_scale, x, *given[1:4], log_decay, beta, state.contiguous()
        )
        return outputs
    parts, after = triton_conv.forward(given)
    q, k, v = parts.float().unflatten(-1, (state.shape[1], -1)).unbind(0)
    with on_device(qkv):
        o, memory = fused_recurrent_gated_delta_rule(
            *(q, k, v),
            g=log_decay,
            beta=beta,
            scale=query_scale,
            use_qk_l2norm_in_kernel=True,
            initial_state=state.contiguous(),
            output_final_state=True,
        )
    return o, memory, after


def _wants_gradient(inputs: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


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
