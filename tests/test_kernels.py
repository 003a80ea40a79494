"""Kernels of a GPU, without one: against the references by Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from phantom import build

from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.ops import chunked, dispatch, reference

ARCHITECTURES = (80, 89, 90, 100)
KERNELS = {"rg_lru": ["triton"], "gated_delta_rule": ["triton", "fla"]}
"""What the kernels of each op need."""
CASES = {
    "rg_lru": [
        "rg_lru, 1, float32",
        "rg_lru, 7, float32",
        "rg_lru, 29, float32",
        "rg_lru, 29, float32, resets",
        "rg_lru, 29, float16, resets",
    ],
    "gated_delta_rule": [
        "gated_delta_rule, 1, float32, no gradients",
        "gated_delta_rule, 5, float32, negative, no gradients",
        "gated_delta_rule, 67, float32, negative",
        "gated_delta_rule, 33, float32, resets",
        "gated_delta_rule, 33, float16, negative",
    ],
}
TOLERANCE = {"float32": 2e-5, "float16": 3e-3}
"""Of differences relative to the norm: of float16, those of what is rounded to it on the way in and out."""


def needs(op: str) -> None:
    for package in KERNELS[op]:
        if find_spec(package) is None:
            pytest.skip(f"the kernels of {op} need {package}, of the extra gpu")


def run(module: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """Run a program of ``tests/kernels`` and return the lines that it prints."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    # What was compiled is kept beside the simulated device, outside of the repository.
    environment |= {"PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(build.cache() / "triton")}
    command = [sys.executable, "-m", f"kernels.{module}", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("op", [pytest.param("rg_lru"), pytest.param("gated_delta_rule", marks=pytest.mark.slow)])
def test_kernels_equal_the_reference_in_the_interpreter(op: str) -> None:
    needs(op)
    numbers = [str(number) for number, case in enumerate(chain(*CASES.values())) if case in CASES[op]]
    found = {row.pop("case"): row for row in run("interpret", *numbers, TRITON_INTERPRET="1")}
    assert [*found] == CASES[op]
    for case, differences in found.items():
        assert max(differences.values()) < TOLERANCE[case.split(", ")[2]], (case, differences)


@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_are_compiled_for_each_architecture(op: str, architecture: int) -> None:
    needs(op)
    found = run("compile", str(architecture), op)
    names = {row["kernel"] for row in found}
    if op == "rg_lru":
        assert names == {"reduce_forward", "forward", "reduce_backward", "backward"}
    else:
        assert {
            "chunk_fwd_kernel_o",
            "prepare_wy_repr_bwd_kernel",
            "fused_recurrent_gated_delta_rule_fwd_kernel",
        } <= names
    assert {row["dtype"] for row in found} == {"bfloat16", "float32"}
    assert all(row["cubin"] > 0 and row["shared"] <= row["most_shared"] for row in found)


def test_without_cuda_all_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16), 7), torch.arange(7)[None]
    monkeypatch.setattr(dispatch, "_kernels", lambda *_: pytest.fail("kernels on a CPU"))
    net(tokens, net.zero_state(1))


def kernels_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str) -> list[bool]:
    """Return whether there are kernels of the RG-LRU and of the gated delta rule, for a GPU and a Triton."""

    class Module:
        __version__ = triton

    monkeypatch.setattr(dispatch, "find_spec", lambda name: Module())
    monkeypatch.setattr(dispatch, "import_module", lambda name: Module())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch.rg_lru_kernels.cache_clear()
    dispatch.delta_rule_kernels.cache_clear()
    device = torch.device("cuda")
    found = [kernels(device) is not None for kernels in (dispatch.rg_lru_kernels, dispatch.delta_rule_kernels)]
    dispatch.rg_lru_kernels.cache_clear()
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
    assert dispatch.rg_lru_kernels.__wrapped__(torch.device("cuda")) is None
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


@pytest.mark.simulated_cuda
def test_on_cuda_the_kernels_are_given_what_the_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, with the kernels' arithmetic by torch: kernels themselves need a driver."""
    calls: list[str] = []

    class RGLRUKernels:
        @staticmethod
        def rg_lru(r: Any, i: Any, z: Any, rate: Any, state: Any, reset_mask: Any, biases: Any) -> Any:
            calls.append(f"rg_lru {r.dtype}")
            return chunked.rg_lru(r.float() + biases[0], i.float() + biases[1], z, rate, state, reset_mask)

    class DeltaKernels:
        RECURRENT_TOKENS = 16

        @staticmethod
        def gated_delta_rule(q: Any, k: Any, *inputs: Any, products: torch.dtype) -> Any:
            calls.append(f"gated_delta_rule {products}")
            q, k = (reference.l2_normalize(x.float()) for x in (q, k))
            return chunked.gated_delta_rule(q * inputs[-1], k, *inputs[:-1])

    net = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16), 7)
    tokens = torch.arange(40)[None] % 7
    expected, _ = net(tokens, net.zero_state(1))
    net, tokens = net.to("cuda"), tokens.to("cuda")
    monkeypatch.setattr(dispatch, "rg_lru_kernels", lambda device: RGLRUKernels)
    monkeypatch.setattr(dispatch, "delta_rule_kernels", lambda device: DeltaKernels)
    found, _ = net(tokens, net.zero_state(1))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["rg_lru torch.float32"]  # products must be float32: the other layer is torch's
    calls.clear()
    with torch.autocast("cuda", torch.bfloat16):
        net(tokens, net.zero_state(1))
    with torch.no_grad():
        net(tokens[:, :1], net.zero_state(1))
    assert calls == [
        "rg_lru torch.bfloat16",
        "gated_delta_rule torch.bfloat16",
        "rg_lru torch.float32",
        "gated_delta_rule torch.float32",
    ]


def test_what_is_compiled_is_kept_outside_of_the_repository() -> None:
    assert REPOSITORY not in (build.cache() / "triton").parents
    assert Path(build.cache()).is_absolute()
