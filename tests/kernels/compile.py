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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from mmrec.model.ops.reference import DeltaGates

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

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            about = {"kernel": self.__name__.lstrip("_"), "architecture": int(_target.arch)}
            sizes = {"shared": kernel.metadata.shared, "cubin": len(kernel.asm["cubin"])}
            found.append(about | sizes | {"most_shared": SHARED_MEMORY[int(_target.arch)]})

    jit.JITFunction.run = compile_only


def launch_kernels(dtype: torch.dtype) -> None:
    """Launch every kernel of this program, forward and backward; of the RG-LRU also on one token."""
    from mmrec.model.ops import kernels

    def backward(*results: Tensor) -> None:
        (sum(result.float().sum() for result in results) + zero).backward()

    def inputs(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype).requires_grad_()

    zero = torch.zeros((), requires_grad=True)
    rate, *vectors = torch.randn(4, 96).requires_grad_()
    weight, square = torch.randn(96, 4).requires_grad_(), torch.randn(96, 96).requires_grad_()
    past, state = torch.randn(1, 3, 96).requires_grad_(), torch.randn(1, 96).requires_grad_()
    for length in (300, 1):
        z, r, i, gate = inputs(1, length, 4 * 96).chunk(4, dim=-1)
        reset = torch.zeros(1, length, dtype=torch.bool) if length > 1 else None
        backward(*kernels.conv_rg_lru((r, i), (vectors[0], vectors[1]), z, (past, weight), rate, state, reset))
    z, r, i, gate = inputs(1, 300, 4 * 96).chunk(4, dim=-1)
    backward(kernels.gated_linear(torch.randn(1, 300, 96), gate, square, dtype))
    backward(kernels.rms_norm(torch.randn(1, 300, 96), rate, 1e-6, dtype))
    backward(kernels.swiglu_linear(inputs(1, 300, 192), square, dtype))
    backward(kernels.normed_linear(inputs(1, 300, 2, 48), (rate[:48], 1e-6), gate, False, square, dtype))
    logits = DeltaGates(z[..., :2], r[..., :2], rate[:2], rate[2:4], rate[4:6])
    backward(*kernels.delta_gates(logits, 1.0, torch.zeros(1, 300, dtype=torch.bool)))


def launch_delta_rule(dtype: torch.dtype, size: int = 64) -> None:
    """Launch every kernel of the gated delta rule once: chunks forward and backward, and token by token."""
    from mmrec.model.ops import fla_delta_rule

    width = 2 * 3 * size
    x, decay, beta = torch.randn(1, 128, width, dtype=dtype), -torch.rand(1, 128, 2), torch.rand(1, 128, 2)
    inputs: list[Any] = [x, torch.zeros(1, 3, width), torch.randn(width, 4), decay, beta]
    inputs = [part.requires_grad_() for part in (*inputs, torch.zeros(1, 2, size, size))]

    def rule(x: Tensor, past: Tensor, weight: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
        return fla_delta_rule.conv_gated_delta_rule(x, (past, weight), (decay, beta), state, products=dtype)

    outputs, after, _ = rule(*inputs)
    torch.autograd.grad(outputs.float().sum() + after.sum(), [inputs[0], *inputs[3:]])
    with torch.no_grad():
        rule(*(part[:, :1] if part.shape[1] == 128 else part for part in inputs))


def main(architecture: int, dtypes: list[torch.dtype]) -> None:
    """Compile all kernels for an architecture, by dtype of what is multiplied.

    The library chooses forms for the GPU that it finds when it is imported: one process is for one architecture.
    """
    warnings.filterwarnings("ignore")
    found: list[dict[str, Any]] = []
    catch_launches(found)
    pretend(architecture)
    for dtype in dtypes:
        launch_kernels(dtype)
        launch_delta_rule(dtype)
        for row in found:
            print(json.dumps(row | {"dtype": str(dtype).removeprefix("torch."), "triton": triton.__version__}))
        found.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), [getattr(torch, part) for part in sys.argv[2].split(",")])
