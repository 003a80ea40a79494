"""The precision of matrix products where none is asked for: bfloat16 where the processor multiplies in it."""

from __future__ import annotations

import torch

FULL, MIXED = "32-true", "bf16-mixed"


def native_precision(accelerator: str) -> str:
    """Return Lightning's name of the fastest precision that ``accelerator`` has units for.

    Weights, memories and the loss stay in float32 with either. On processors without such units bfloat16 is
    emulated, and slower than float32.

    Args:
        accelerator: Lightning's name, such as "auto", "cpu" or "gpu".
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return MIXED if torch.cuda.is_bf16_supported(including_emulation=False) else FULL
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        has = torch.cpu.get_capabilities()
        return MIXED if has.get("avx512_bf16") or has.get("amx_bf16") else FULL
    return FULL
