"""Compiles the kernels to machine code for NVIDIA's architectures, without a driver: a program of its own.

``python -m kernels.compile 80 90`` prints, a line of JSON for each kernel and architecture, what came of it. Each
launch is caught before a driver is asked for, and what would have been launched is compiled.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that a block of threads may have."""
_target = GPUTarget("cuda", 0, 32)


class _Driver:
    """Says what a driver would of the architecture, and computes nothing."""

    utils = types.SimpleNamespace(get_device_properties=lambda index: _properties())

    def get_current_target(self) -> GPUTarget:
        return _target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _properties() -> dict[str, int]:
    shared = SHARED_MEMORY[int(_target.arch)]
    return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}


class _Device:
    """Stands for ``torch.cuda.device``."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def pretend(architecture: int) -> None:
    """Let torch and Triton believe in a GPU of an ``architecture``, such as 90."""
    global _target
    _target = GPUTarget("cuda", architecture, 32)
    cuda: Any = torch.cuda
    capability, shared = divmod(architecture, 10), SHARED_MEMORY[architecture]
    properties = types.SimpleNamespace(
        name="NVIDIA", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 << 30
    )
    properties.shared_memory_per_block_optin = shared
    cuda.get_device_name = lambda *_: "NVIDIA"
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_properties = lambda *_: properties
    cuda.device, cuda.current_device, cuda.device_count, cuda.is_available = (
        _Device,
        lambda: 0,
        lambda: 1,
        lambda: True,
    )
    driver.set_active(_Driver())


def catch_launches(found: list[dict[str, Any]]) -> None:
    """Compile what is launched from now on, and append to ``found`` what came of it."""
    run = jit.JITFunction.run
    seen: set[str] = set()
    compiled_for: dict[int, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if compiled_for.get(id(self)) != _target.arch:  # it keeps what it compiled by the number of the device
            self.device_caches.clear()
            compiled_for[id(self)] = _target.arch
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            about = {"kernel": self.__name__.lstrip("_"), "architecture": int(_target.arch)}
            sizes = {"shared": kernel.metadata.shared, "cubin": len(kernel.asm["cubin"])}
            found.append(about | sizes | {"most_shared": SHARED_MEMORY[int(_target.arch)]})

    jit.JITFunction.run = compile_only


def launch_rg_lru(dtype: torch.dtype) -> None:
    """Launch every kernel of the RG-LRU, forward and backward: on a long row with resets, and on one token."""
    from mmrec.model.ops import triton_rg_lru

    for length in (300, 1):
        r, i, z = (torch.randn(1, length, 96, dtype=dtype).requires_grad_() for _ in range(3))
        rate, *biases = (torch.randn(96).requires_grad_() for _ in range(3))
        state, reset = torch.randn(1, 96).requires_grad_(), torch.zeros(1, length, dtype=torch.bool)
        given = (r, i, z, rate, state, reset if length > 1 else None, (biases[0], biases[1]))
        outputs, after = triton_rg_lru.rg_lru(*given)
        torch.autograd.grad(outputs.sum() + after.sum(), [r, i, z, state, rate, *biases])


def launch_delta_rule(dtype: torch.dtype, size: int) -> None:
    """Launch every kernel of the gated delta rule once: chunks forward and backward, and token by token."""
    from mmrec.model.ops import fla_delta_rule

    q, k, v = (torch.randn(1, 2, 128, size).requires_grad_() for _ in range(3))
    decay, beta = (-torch.rand(1, 2, 128)).requires_grad_(), torch.rand(1, 2, 128).requires_grad_()
    inputs: list[Any] = [q, k, v, decay, beta, torch.zeros(1, 2, size, size).requires_grad_()]
    outputs, after = fla_delta_rule.gated_delta_rule(*inputs, products=dtype)
    torch.autograd.grad(outputs.sum() + after.sum(), inputs)
    with torch.no_grad():
        fla_delta_rule.gated_delta_rule(*(x[:, :, :1] if x.shape[2] == 128 else x for x in inputs), products=dtype)


def main(architectures: list[int], ops: list[str]) -> None:
    """Compile all kernels of ``ops`` for each architecture, one process for one of them where several are named."""
    warnings.filterwarnings("ignore")
    found: list[dict[str, Any]] = []
    catch_launches(found)
    for architecture in architectures:
        pretend(architecture)
        for dtype in (torch.bfloat16, torch.float32):
            if "rg_lru" in ops:
                launch_rg_lru(dtype)
            if "gated_delta_rule" in ops:
                launch_delta_rule(dtype, 64)
            for row in found:
                print(json.dumps(row | {"dtype": str(dtype).removeprefix("torch."), "triton": triton.__version__}))
            found.clear()


if __name__ == "__main__":
    main([int(part) for part in sys.argv[1].split(",")], sys.argv[2].split(","))
