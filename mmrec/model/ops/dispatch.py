"""The one place that chooses how an operation is computed: by kernels on CUDA or on a CPU, else by torch.

The extra ``gpu`` brings the kernels for CUDA: Triton for the RG-LRU, flash-linear-attention for the gated delta rule.
On a CPU, where there is a C compiler, the kernels of :mod:`mmrec.model.ops.native` compute whole layers but for their
matrix products. Everywhere else all is computed by torch (:mod:`chunked`, :mod:`fused`).
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
from torch.nn import functional as F

from mmrec.core.errors import one_line
from mmrec.model.ops import chunked, fused, reference

BROKEN_ON_HOPPER = ((3, 4), (3, 7, 1))
"""Versions of Triton, from the first to below the second, whose gradients of the gated delta rule are wrong there."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: older ones have no units for bfloat16, and were not compiled for."""


def native(x: Tensor, dtype: torch.dtype | None = None) -> ModuleType | None:
    """Return the functions of :mod:`mmrec.model.ops.native` if they are to compute what follows ``x`` [B, T, any].

    Args:
        x: the input.
        dtype: that of matrix products; that of ``x`` if left out.
    """
    if x.device.type != "cpu" or x.dim() != 3 or x.shape[1] == 1 or torch.compiler.is_compiling():
        return None
    functions = native_functions()
    return functions if functions is not None and functions.takes(x, dtype or x.dtype) else None


def choose_native(wanted: bool = True) -> bool:
    """Choose whether the kernels of :mod:`mmrec.model.ops.native` are used; return whether they are.

    They are not where they cannot be built. A run that is resumed chooses as it was trained until then: their sums
    differ from torch's in the last bits.
    """
    native_functions.cache_clear()
    _chosen["native"] = wanted
    return uses_native()


def uses_native() -> bool:
    """Return whether the kernels of :mod:`mmrec.model.ops.native` are used on a CPU."""
    functions = native_functions()
    return functions is not None and functions.library(torch.float32) is not None


def native_problem() -> str | None:
    """Return why the kernels of :mod:`mmrec.model.ops.native` cannot be used; None where nobody wants them."""
    functions = native_functions()
    problem: str | None = None if functions is None else functions.problem()
    return problem


_chosen = {"native": True}


@cache
def native_functions() -> ModuleType | None:
    """Return the kernels for a CPU; None where they are not to be used."""
    # An exported model runs this code without the package, and so without its kernels.
    if not _chosen["native"] or find_spec("mmrec") is None:
        return None
    return import_module("mmrec.model.ops.native.functions")


def rms_norm(x: Tensor, weight: Tensor, eps: float, feeds_product: bool = False) -> Tensor:
    """:func:`mmrec.model.ops.reference.rms_norm`; of autocast's dtype where it only ``feeds_product``, if at all."""
    if x.dtype == weight.dtype == torch.float32:
        is_narrow = feeds_product and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_narrow else x.dtype
        kernels = native(x, dtype)
        if kernels is not None:
            y: Tensor = kernels.rms_norm(x, weight, eps, dtype)
            return y
    return fused.rms_norm(x, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """:func:`mmrec.model.ops.reference.swiglu`."""
    kernels = native(x)
    y: Tensor = fused.swiglu(x) if kernels is None else kernels.swiglu(x)
    return y


def dropout_add(x: Tensor, y: Tensor, dropout: float) -> Tensor:
    """Return ``x`` plus ``y``, of which a share of ``dropout`` is left out (Srivastava et al. 2014).

    Args:
        x: [B, T, D], the residual stream.
        y: [B, T, D], what a layer adds to it.
        dropout: 0 outside training.
    """
    if not dropout:
        return x + y
    kernels = native(y) if x.dtype == torch.float32 else None
    total: Tensor = x + F.dropout(y, dropout) if kernels is None else kernels.dropout_add(x, y, dropout)
    return total


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
