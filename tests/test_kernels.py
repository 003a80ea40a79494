"""Kernels of a GPU, without one: against the references by Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from phantom import build
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.ops import chunked, dispatch, fused, reference

EVERYWHERE = "CI" in os.environ
"""Compiled is for every architecture; elsewhere for one, as that takes a minute each, the first time."""
ARCHITECTURES = (80, 89, 90, 100) if EVERYWHERE else (90,)
DTYPES = "bfloat16,float32" if EVERYWHERE else "bfloat16"
OWN = {"lru_reduce", "lru", "conv", "norm", "gated", "gates"}
"""Names of kernels of this program, each a forward and a backward one."""
OF_THE_DELTA_RULE = {
    "chunk_fwd_kernel_o",
    "prepare_wy_repr_bwd_kernel",
    "fused_recurrent_gated_delta_rule_fwd_kernel",
    "l2norm_bwd_kernel",
}
"""Some of those of the library."""
TOLERANCE = {"float32": 2e-5, "float16": 3e-3}
"""Of differences relative to the norm: of float16, those of what is rounded to it on the way in and out."""


def needs(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"these kernels need {package}, of the extra gpu")


def run(module: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """Run a program of ``tests/kernels`` and return the lines that it prints."""
    return run_program("-m", f"kernels.{module}", *arguments, **environment)


def run_program(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    """Run Python with ``arguments`` in the repository, and return the lines of JSON that it prints."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    # What was compiled is kept beside the simulated device, outside of the repository.
    environment |= {"PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(build.cache() / "triton")}
    command = [sys.executable, *arguments]
    variables = os.environ | environment
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    needs("triton", "fla")
    from mmrec.model.ops import kernels

    found = {row.pop("case"): row for row in run("interpret", TRITON_INTERPRET="1")}
    ops = {name.split(",")[0] for name in found}
    assert ops == {*kernels.__all__, "conv_gated_delta_rule"}
    for case, differences in found.items():
        assert max(differences.values()) < TOLERANCE[case.split(", ")[2]], (case, differences)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_are_compiled_for_each_architecture(architecture: int) -> None:
    needs("triton", "fla")
    found = run("compile", str(architecture), DTYPES)
    names = {row["kernel"] for row in found}
    assert {f"{name}_{way}" for name in OWN for way in ("forward", "backward")} | OF_THE_DELTA_RULE <= names
    assert {row["dtype"] for row in found} == {*DTYPES.split(",")}
    assert all(row["cubin"] > 0 and row["shared"] <= row["most_shared"] for row in found)


LAYERS = """
import os, sys
sys.path[:0] = ["scripts", "tests"]
import count_kernels, json
count_kernels.cuda.install()
count_kernels.launches_compute_nothing()
for kind in ("short", "long"):
    for documents in (False, True):
        forward, backward, kept = count_kernels.count_layer(kind, 192, documents, False)
        print(json.dumps({"kind": kind, "launches": forward + backward, "kept": kept}), flush=True)
# As the forked processes of other tests do: torch's thread for the device, at the end of Python, has aborted it.
os._exit(0)
"""


@pytest.mark.slow
def test_a_layer_keeps_little_and_launches_little() -> None:
    """On the simulated device, where launches are counted and compute nothing."""
    needs("triton", "fla")
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    found = run_program("-c", LAYERS)
    assert [row["launches"] for row in found] == [30, 30, 53, 53]
    assert all(row["kept"] <= 16 for row in found), found  # bytes a token and channel


def test_without_cuda_all_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16), 7), torch.arange(7)[None]
    monkeypatch.setattr(dispatch, "_kernels", lambda *_: pytest.fail("kernels on a CPU"))
    net(tokens, net.zero_state(1))


def kernels_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str) -> list[bool]:
    """Return whether there are kernels of this program and of the gated delta rule, for a GPU and a Triton."""

    class Module:
        __version__ = triton

    monkeypatch.setattr(dispatch, "find_spec", lambda name: Module())
    monkeypatch.setattr(dispatch, "import_module", lambda name: Module())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch.own_kernels.cache_clear()
    dispatch.delta_rule_kernels.cache_clear()
    device = torch.device("cuda")
    found = [kernels(device) is not None for kernels in (dispatch.own_kernels, dispatch.delta_rule_kernels)]
    dispatch.own_kernels.cache_clear()
    dispatch.delta_rule_kernels.cache_clear()
    return found


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [
        ((7, 5), "3.7.1", [False, False]),
        ((8, 9), "3.6.0", [True, True]),
        ((9, 0), "3.6.0", [True, False]),  # wrong gradients there
        ((9, 0), "3.3.1", [True, True]),
        ((9, 0), "3.7.1", [True, True]),
        ((10, 0), "3.6.0", [True, True]),
    ],
)
def test_kernels_that_are_wrong_on_a_gpu_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str, expected: list[bool]
) -> None:
    assert kernels_of(monkeypatch, capability, triton) == expected


def test_kernels_that_cannot_be_imported_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("of another version")

    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "import_module", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dispatch.own_kernels.__wrapped__(torch.device("cuda")) is None
    assert capsys.readouterr().err == "kernels for cuda are left out: of another version\n"


def test_products_are_as_coarse_as_was_allowed() -> None:
    assert dispatch.product_dtype("cpu") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.product_dtype("cpu") == torch.bfloat16
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert dispatch.product_dtype("cpu") == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


class OwnKernels:
    """What the module has, with the arithmetic by torch; writes down what it is given."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def conv_rg_lru(
        self, gates: Any, biases: Any, x: Tensor, conv: Any, rate: Tensor, state: Tensor, reset_mask: Tensor | None
    ) -> Any:
        self.calls.append(f"conv_rg_lru {x.dtype}")
        z, past = fused.causal_conv(x, *conv)
        r, i = (gate.float() + bias for gate, bias in zip(gates, biases, strict=True))
        return *chunked.rg_lru(r, i, z, rate, state, reset_mask), past

    def causal_conv(self, x: Tensor, past: Tensor, weight: Tensor, reset_mask: Tensor | None) -> Any:
        self.calls.append(f"causal_conv {x.dtype}")
        return fused.causal_conv(x, past, weight)

    def delta_gates(self, given: reference.DeltaGates, beta_max: float, reset_mask: Tensor | None) -> Any:
        log_decay, beta = reference.delta_gates(given, torch.float32)
        return log_decay, beta_max * beta

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return fused.rms_norm(x, weight, eps).to(dtype)

    def swiglu_linear(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(fused.swiglu(x), weight.to(dtype))

    def gated_linear(self, h: Tensor, gate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear((h * gate.sigmoid()).to(dtype), weight.to(dtype))

    def normed_linear(
        self, o: Tensor, norm: Any, gate: Tensor, silu: bool, weight: Tensor, dtype: torch.dtype
    ) -> Any:
        assert not silu
        self.calls.append(f"normed_linear {o.dtype}")
        return F.linear((fused.rms_norm(o, *norm).flatten(2) * gate.sigmoid()).to(dtype), weight.to(dtype))


class DeltaKernels:
    RECURRENT_TOKENS = 16

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def conv_gated_delta_rule(
        self, qkv: Tensor, conv: Any, gates: Any, state: Tensor, scale: float, reset: Tensor | None, *, products: Any
    ) -> Any:
        self.calls.append(f"conv_gated_delta_rule {products}")
        convolved, past = fused.causal_conv(qkv, *conv)
        q, k, v = (x.float() for x in reference.split_heads(convolved, state.shape[1]))
        q, k = reference.l2_normalize(q) * scale, reference.l2_normalize(k)
        o, memory = chunked.gated_delta_rule(q, k, v, gates[0].mT, gates[1].mT, state)
        return o.transpose(1, 2).to(products), memory, past


@pytest.mark.simulated_cuda
def test_on_cuda_the_kernels_are_given_what_the_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, with the kernels' arithmetic by torch: kernels themselves need a driver."""
    calls: list[str] = []
    net = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16), 7)
    tokens = torch.arange(40)[None] % 7
    expected, _ = net(tokens, net.zero_state(1))
    net, tokens = net.to("cuda"), tokens.to("cuda")
    monkeypatch.setattr(dispatch, "own_kernels", lambda device: OwnKernels(calls))
    monkeypatch.setattr(dispatch, "delta_rule_kernels", lambda device: DeltaKernels(calls))
    found, _ = net(tokens, net.zero_state(1))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    # Products must be float32: the recurrence of the other layer is torch's.
    assert calls == ["conv_rg_lru torch.float32", "causal_conv torch.float32", "normed_linear torch.float32"]
    calls.clear()
    with torch.autocast("cuda", torch.bfloat16):
        net(tokens, net.zero_state(1))
    with torch.no_grad():
        net(tokens[:, :1], net.zero_state(1))
    assert calls == [
        "conv_rg_lru torch.bfloat16",
        "conv_gated_delta_rule torch.bfloat16",
        "normed_linear torch.bfloat16",
        "conv_rg_lru torch.float32",
        "conv_gated_delta_rule torch.float32",
        "normed_linear torch.float32",
    ]


def test_what_is_compiled_is_kept_outside_of_the_repository() -> None:
    assert REPOSITORY not in (build.cache() / "triton").parents
    assert Path(build.cache()).is_absolute()


class Adapted(nn.Linear):
    """As an adapter of LoRA stands in the place of a linear map, and has its weight."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + 1
        return y


def test_an_adapter_in_the_place_of_an_output_map_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, adapted = nn.Linear(6, 6, bias=False), Adapted(6, 6, bias=False)
    adapted.weight = plain.weight
    h, gate, heads = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 3, 2, 3)
    norm = (torch.ones(3), 1e-6)
    calls: list[Callable[[nn.Linear], Tensor]] = [
        lambda output: dispatch.swiglu_linear(torch.cat([h, gate], dim=-1), output),
        lambda output: dispatch.gated_linear(h, gate, output, torch.float32),
        lambda output: dispatch.normed_linear(heads, norm, gate, False, output, torch.float32),
    ]
    expected = [call(plain) + 1 for call in calls]
    monkeypatch.setattr(dispatch, "_kernels_for", lambda *inputs: SimpleNamespace())  # as on CUDA, but without any
    for call, values in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(adapted), values)
        with pytest.raises(AttributeError):
            call(plain)  # the kernels are asked for
