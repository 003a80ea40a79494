"""The one place that chooses how an operation is computed: by kernels on CUDA or on a CPU, else by torch.

The extra ``gpu`` brings the kernels for CUDA: Triton for those of this program, flash-linear-attention for the gated
delta rule. On a CPU, where there is a C compiler, the kernels of :mod:`mmrec.model.ops.native` compute whole layers
but for their matrix products. Everywhere else all is computed by torch (:mod:`chunked`, :mod:`fused`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.core.errors import one_line
from mmrec.model.ops import chunked, fused, reference
from mmrec.model.ops.reference import DeltaGates

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
    if _leaves_out_native.get():
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
    """Return whether the kernels of :mod:`mmrec.model.ops.native` are used on a CPU, which builds them if need be."""
    functions = native_functions()
    return functions is not None and bool(functions.is_built())


def has_native(dtype: torch.dtype) -> bool:
    """Return whether those for matrix products of ``dtype`` are used here on a CPU; they are built if need be."""
    return native(torch.zeros(1, 2, 1, dtype=dtype)) is not None


def has_native_learning() -> bool:
    """Return whether those that learn from a text that is read are used here; they are built if need be."""
    build = import_module("mmrec.model.ops.native.build")
    return has_native(torch.float32) and build.library(build.LEARNING) is not None


@contextmanager
def without_native() -> Iterator[None]:
    """Compute by torch, within, what the kernels of :mod:`mmrec.model.ops.native` compute; in this thread alone."""
    token = _leaves_out_native.set(True)
    try:
        yield
    finally:
        _leaves_out_native.reset(token)


def native_problem(learning: bool = False) -> str | None:
    """Return why the kernels of :mod:`mmrec.model.ops.native` cannot be used; None where nobody wants them.

    Args:
        learning: whether those of :func:`has_native_learning` are asked about.
    """
    if native_functions() is None:
        return None
    build = import_module("mmrec.model.ops.native.build")
    problem: str | None = build.problem(build.LEARNING if learning else torch.float32)
    return problem


_chosen = {"native": True}
_leaves_out_native = ContextVar("leaves_out_native", default=False)


@cache
def native_functions() -> ModuleType | None:
    """Return the kernels for a CPU; None where they are not to be used."""
    # An exported model runs this code without the package, and so without its kernels.
    if not _chosen["native"] or find_spec("mmrec") is None:
        return None
    return import_module("mmrec.model.ops.native.functions")


def native_muon(tensors: Sequence[Tensor | None]) -> ModuleType | None:
    """Return :mod:`mmrec.model.ops.native.muon` if its kernels take ``tensors``: matrices, gradients, averages."""
    if native_functions() is None:
        return None
    kernels = import_module("mmrec.model.ops.native.muon")
    return kernels if kernels.takes(tensors) else None


def native_losses(logits: Tensor) -> ModuleType | None:
    """Return :mod:`mmrec.model.ops.native.losses` if its kernels compute the losses of ``logits`` [B, T, N]."""
    return None if native(logits) is None else import_module("mmrec.model.ops.native.losses")


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the root of the sum of the squares of all ``gradients``, a scalar."""
    if native_functions() is not None:
        kernels = import_module("mmrec.model.ops.native.gradients")
        if kernels.takes(gradients):
            norm: Tensor = kernels.total_norm(gradients)
            return norm
    return torch.nn.utils.get_total_norm(gradients)


def conv_rg_lru(
    gates: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    x: Tensor,
    conv: tuple[Tensor, Tensor],
    rate: Tensor,
    state: Tensor,
    reset_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.rg_lru` of what a causal convolution makes of ``x`` [B, T, D].

    Args:
        gates: those of recurrence and input, [B, T, D] each.
        biases: [D], added to them.
        x: what the convolution reads.
        conv: its past [B, C - 1, D] and its weight [D, C].
        rate: [D].
        state: [B, D]; the results have its dtype, which may be another than that of gates and inputs.
        reset_mask: [B, T] (bool): tokens before which state and past are set to zero; None for none.

    Returns:
        The outputs [B, T, D], the state, and the last inputs of the convolution [B, C - 1, D].
    """
    if kernels := _kernels_for(x, state):
        found: tuple[Tensor, Tensor, Tensor] = kernels.conv_rg_lru(gates, biases, x, conv, rate, state, reset_mask)
        return found
    z, past = causal_conv(x, *conv, reset_mask)
    r, i = (gate.to(state.dtype) + bias for gate, bias in zip(gates, biases, strict=True))
    return *chunked.rg_lru(r, i, z, rate, state, reset_mask), past


def conv_gated_delta_rule(
    qkv: Tensor,
    conv: tuple[Tensor, Tensor],
    gates: tuple[Tensor, Tensor],
    state: Tensor,
    query_scale: float | None = None,
    reset_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.gated_delta_rule` of what a causal convolution and a SiLU make of ``qkv``.

    Queries and keys are brought to length 1, and queries then multiplied by ``query_scale``, where there is one.

    The kernels multiply in autocast's dtype, or, without autocast, as TF32 where torch may do so, which is
    ``torch.set_float32_matmul_precision("high")``. Where products must be float32, as in scoring and generating by
    default, they take the few tokens that they read one by one, and torch the others.

    Args:
        qkv: [B, T, 3 H K]: queries, keys and values.
        conv: its past [B, C - 1, 3 H K] and its weight [3 H K, C].
        gates: of :func:`delta_gates`.
        state: [B, H, K, V].
        query_scale: of the queries.
        reset_mask: [B, T] (bool): tokens that see nothing from before them; the gates say the same.

    Returns:
        The outputs [B, T, H, V], the state, and the last inputs of the convolution.
    """
    if qkv.is_cuda and state.dtype == torch.float32 and not torch.compiler.is_compiling():
        products, kernels = product_dtype(qkv.device.type), delta_rule_kernels(qkv.device)
        if kernels is not None and (products is not None or _reads_one_by_one(kernels, qkv.shape[1])):
            found: tuple[Tensor, Tensor, Tensor] = kernels.conv_gated_delta_rule(
                qkv, conv, gates, state, query_scale or 1.0, reset_mask, products=products or torch.float32
            )
            return found
    convolved, past = causal_conv(qkv, *conv, reset_mask)
    q, k, v = reference.split_heads(convolved, state.shape[1])
    q, k = (reference.l2_normalize(x.to(state.dtype)) for x in (q, k))
    q = q if query_scale is None else q * query_scale
    o, memory = chunked.gated_delta_rule(q, k, v, gates[0].mT, gates[1].mT, state)
    return o.transpose(1, 2), memory, past


def delta_gates(
    given: DeltaGates, beta_max: float, dtype: torch.dtype, reset_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the log-decay, by which a reset leaves nothing, and the writing strength: [B, T, H], in ``dtype``."""
    if dtype == torch.float32 and (kernels := _kernels_for(given.decay)):
        found: tuple[Tensor, Tensor] = kernels.delta_gates(given, beta_max, reset_mask)
        return found
    log_decay, beta = reference.delta_gates(given, dtype)
    return reference.apply_reset(log_decay, reset_mask), beta_max * beta


def causal_conv(x: Tensor, past: Tensor, weight: Tensor, reset_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`mmrec.model.ops.reference.causal_conv`; a token sees nothing from before the last reset."""
    if kernels := _kernels_for(x):
        found: tuple[Tensor, Tensor] = kernels.causal_conv(x, past, weight, reset_mask)
        return found
    if reset_mask is not None:
        return fused.causal_conv_of_documents(x, past, weight, reset_mask)
    return fused.causal_conv(x, past, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, feeds_product: bool = False) -> Tensor:
    """:func:`mmrec.model.ops.reference.rms_norm`; of autocast's dtype where it only ``feeds_product``, if at all."""
    kind = x.device.type
    is_narrow = feeds_product and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_narrow else x.dtype
    if kernels := _kernels_for(x):
        on_cuda: Tensor = kernels.rms_norm(x, weight, eps, dtype)
        return on_cuda
    if x.dtype == weight.dtype == torch.float32 and (functions := native(x, dtype)):
        y: Tensor = functions.rms_norm(x, weight, eps, dtype)
        return y
    return fused.rms_norm(x, weight, eps)


def swiglu_linear(x: Tensor, output: nn.Linear) -> Tensor:
    """Return what ``output`` makes of :func:`mmrec.model.ops.reference.swiglu` of ``x`` [..., 2F]."""
    if (kernels := _kernels_for(x)) and _is_plain(output):
        found: Tensor = kernels.swiglu_linear(x, output.weight, _linear_dtype(x))
    else:
        functions = native(x)
        found = output(fused.swiglu(x) if functions is None else functions.swiglu(x))
    return found


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


def gated_linear(h: Tensor, gate: Tensor, output: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return what ``output`` makes of ``h``, rounded to ``dtype``, times the sigmoid of ``gate``; both [..., D]."""
    if (kernels := _kernels_for(h)) and _is_plain(output):
        found: Tensor = kernels.gated_linear(h, gate, output.weight, _linear_dtype(gate))
    else:
        found = output(h.to(dtype) * gate.sigmoid())
    return found


def normed_linear(
    o: Tensor, norm: tuple[Tensor, float], gate: Tensor, silu: bool, output: nn.Linear, dtype: torch.dtype
) -> Tensor:
    """Return what ``output`` makes of normalized heads times their gate.

    Args:
        o: [B, T, H, V].
        norm: the weight [V] and the epsilon of the RMS norm of each head.
        gate: [B, T, H V]; its sigmoid, or SiLU, is multiplied by.
        silu: which of them.
        output: [D, H V].
        dtype: what is normalized is rounded to.
    """
    if (kernels := _kernels_for(o)) and _is_plain(output):
        found: Tensor = kernels.normed_linear(o, norm, gate, silu, output.weight, _linear_dtype(gate))
    else:
        # In the layout that the recurrence has: sums of gradients keep their order.
        normal = fused.rms_norm(o.transpose(1, 2), *norm).to(dtype).transpose(1, 2).flatten(2)
        found = output(normal * (F.silu(gate) if silu else gate.sigmoid()))
    return found


def _is_plain(output: nn.Linear) -> bool:
    """Whether ``output`` is what its weight says, and nothing else: no adapter of LoRA in its place, and no hooks."""
    return type(output) is nn.Linear and not output._forward_hooks and not output._forward_pre_hooks


def _linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear map of ``x`` computes."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def product_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that matrix products may be made in by coarser units; None where they must be float32."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None if torch.get_float32_matmul_precision() == "highest" else torch.float32


def _reads_one_by_one(kernels: ModuleType, length: int) -> bool:
    return not torch.is_grad_enabled() and length <= kernels.RECURRENT_TOKENS


def _kernels_for(*inputs: Tensor) -> ModuleType | None:
    """Return the kernels of this program where ``inputs`` are on a device that has them, in 32 bits at most."""
    if not inputs[0].is_cuda or any(x.dtype == torch.float64 for x in inputs) or torch.compiler.is_compiling():
        return None
    return own_kernels(inputs[0].device)


@cache
def own_kernels(device: torch.device) -> ModuleType | None:
    """Return the module with the kernels of this program for ``device``; None where they cannot run."""
    return _kernels("kernels", device)


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
