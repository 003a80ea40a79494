"""The one place that chooses how a recurrence is computed: by kernels on CUDA, else by torch (:mod:`chunked`).

The extra ``gpu`` brings the kernels: Triton for the RG-LRU, flash-linear-attention for the gated delta rule. Without
it, and on every other device, all is computed by torch.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmrec.core.errors import one_line
from mmrec.model.ops import chunked, reference

BROKEN_ON_HOPPER = ((3, 4), (3, 7, 1))
"""Versions of Triton, from the first to below the second, whose gradients of the gated delta rule are wrong there."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: older ones have no units for bfloat16, and were not compiled for."""


def rg_lru(
    r: Tensor,
    i: Tensor,
    z: Tensor,
    rate: Tensor,
    state: Tensor,
    reset_mask: Tensor | None,
    biases: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.rg_lru` of the gates ``r`` and ``i`` with their ``biases`` [D] added.

    The gates, the inputs and the biases may be of another dtype than ``state``, which is that of the results.
    """
    if z.is_cuda and state.dtype == torch.float32:
        kernels = rg_lru_kernels(z.device)
        if kernels is not None:
            found: tuple[Tensor, Tensor] = kernels.rg_lru(r, i, z, rate, state, reset_mask, biases)
            return found
    r, i = (gate.to(state.dtype) + bias for gate, bias in zip((r, i), biases, strict=True))
    return chunked.rg_lru(r, i, z, rate, state, reset_mask)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    query_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.gated_delta_rule` in the dtype of ``state``, of vectors of any length.

    Queries and keys are brought to length 1 here, and queries then multiplied by ``query_scale``, where there is one.

    The kernels multiply in autocast's dtype, or, without autocast, as TF32 where torch may do so, which is
    ``torch.set_float32_matmul_precision("high")``. Where products must be float32, as in scoring and generating by
    default, they take the few tokens that they read one by one, and torch the others.
    """
    if q.is_cuda and state.dtype == torch.float32:
        products = product_dtype(q.device.type)
        kernels = delta_rule_kernels(q.device)
        if kernels is not None and (products is not None or _reads_one_by_one(kernels, q)):
            found: tuple[Tensor, Tensor] = kernels.gated_delta_rule(
                q, k, v, log_decay, beta, state, query_scale or 1.0, products=products or torch.float32
            )
            return found
    q, k = (reference.l2_normalize(x.to(state.dtype)) for x in (q, k))
    q = q if query_scale is None else q * query_scale
    return chunked.gated_delta_rule(q, k, v, log_decay, beta, state)


def product_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that matrix products may be made in by coarser units; None where they must be float32."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None if torch.get_float32_matmul_precision() == "highest" else torch.float32


def _reads_one_by_one(kernels: ModuleType, q: Tensor) -> bool:
    return not torch.is_grad_enabled() and q.shape[2] <= kernels.RECURRENT_TOKENS


@cache
def rg_lru_kernels(device: torch.device) -> ModuleType | None:
    """Return the module with the kernels of the RG-LRU for ``device``; None where they cannot run."""
    return _kernels("triton_rg_lru", device)


@cache
def delta_rule_kernels(device: torch.device) -> ModuleType | None:
    """Return the module with those of the gated delta rule; None where they cannot run, or would compute it wrong."""
    if find_spec("fla") is None or (_is_hopper(device) and not _is_sound_on_hopper()):
        return None
    return _kernels("fla_delta_rule", device)


def _kernels(name: str, device: torch.device) -> ModuleType | None:
    """Import kernels, where Triton can compile for ``device``; say so where they cannot be imported."""
    is_nvidia = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    # An exported model runs this code without the package, and so without its kernels.
    if not is_nvidia or find_spec("triton") is None or find_spec("mmrec") is None:
        return None
    try:
        return import_module(f"mmrec.model.ops.{name}")
    except Exception as error:  # whatever another version of these packages raises
        print(f"kernels for {device} are left out: {one_line(error)[:200]}", file=sys.stderr)
        return None


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _is_sound_on_hopper() -> bool:
    """Whether the version of Triton that is installed is not among :data:`BROKEN_ON_HOPPER`."""
    if find_spec("triton") is None:
        return False
    triton: Any = import_module("triton")
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    return not BROKEN_ON_HOPPER[0] <= version < BROKEN_ON_HOPPER[1]
