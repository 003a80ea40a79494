"""The compiled kernels for a CPU against torch's forms: outputs, gradients, final state; how they are built."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit, last
from native_marks import needs_compiler, needs_tiles
from torch import Tensor

from mmrec.core.threads import available_cores
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.ops import dispatch
from mmrec.model.ops.native import build, functions, muon
from mmrec.training.muon import orthogonalize

FORMS = [
    ModelConfig(dim=32, layers=2, layer_types=("short",), heads=2, ffn_dim=40),
    ModelConfig(dim=20, layers=2, layer_types=("short",), heads=2, ffn_dim=13, conv_width=1),
    ModelConfig(dim=32, layers=2, layer_types=("long",), heads=2, ffn_dim=40),
    ModelConfig(
        dim=20, layers=1, layer_types=("long",), heads=4, ffn_dim=13, conv_width=2, negative_eigenvalues=True
    ),
    ModelConfig(dim=80, layers=1, layer_types=("long", "short"), heads=1, ffn_dim=13),  # more than 64 values a head
    ModelConfig(dim=36, layers=2, layer_types=("portable",), heads=2, ffn_dim=40),
]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    build.library.cache_clear()
    dispatch.choose_native()


def made(config: ModelConfig) -> RecurrentLM:
    net = RecurrentLM(config, 11)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def results(net: RecurrentLM, tokens: Tensor, reset_mask: Tensor | None, autocast: bool = False) -> dict[str, Tensor]:
    """Return outputs, final states, and the gradients of weights and of the state before, in float64."""
    torch.manual_seed(1)
    random = [tuple(torch.randn(part.shape, dtype=torch.float32) for part in layer) for layer in net.zero_state(3)]
    dtype = net.embedding.weight.dtype
    state = [tuple(part.to(dtype).requires_grad_() for part in layer) for layer in random]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, after = net(tokens, state, reset_mask)
    parts = [part for layer in after for part in layer]
    loss = logits.double().log_softmax(-1)[..., 0].mean() + sum(
        part.double().sin().mean() for part in parts if part.numel()
    )
    leaves = dict(net.named_parameters()) | {f"state {n}": part for n, part in enumerate(sum(state, ()))}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"logits": logits} | {f"after {n}": part for n, part in enumerate(parts)}
    found |= {name: grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    return {name: value.detach().double() for name, value in found.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-6)) for name in theirs)


@needs_compiler
@pytest.mark.parametrize("length", [2, 3, 33, 70])
@pytest.mark.parametrize("config", FORMS, ids=lambda config: f"{config.layer_types[0]}-{config.dim}")
@pytest.mark.parametrize("resets", [False, True])
def test_kernels_equal_torch(config: ModelConfig, length: int, resets: bool) -> None:
    net, tokens = made(config), torch.randint(11, (3, length))
    mask = torch.rand(3, length) < 0.2 if resets else None
    expected = results(copy.deepcopy(net).double(), tokens, mask)  # in float64 it is torch that computes
    assert difference(results(net, tokens, mask), expected) < 1e-4


@needs_compiler
@pytest.mark.parametrize("config", FORMS[::2], ids=lambda config: config.layer_types[0])
def test_in_bfloat16_kernels_are_as_exact_as_torch(config: ModelConfig) -> None:
    net, tokens = made(config), torch.randint(11, (3, 70))
    expected = results(copy.deepcopy(net).double(), tokens, None)
    ours = results(net, tokens, None, autocast=True)
    dispatch.choose_native(False)
    torchs = results(net, tokens, None, autocast=True)

    def typical(found: dict[str, Tensor]) -> float:
        return (
            torch.tensor([difference({name: found[name]}, {name: expected[name]}) for name in expected])
            .median()
            .item()
        )

    assert 0 < typical(ours) < 1.5 * typical(torchs)


@needs_compiler
def test_reading_in_two_parts_is_reading_at_once() -> None:
    config = ModelConfig(dim=32, layers=4, layer_types=("short", "long"), heads=2, ffn_dim=40)
    net, tokens = made(config), torch.randint(11, (2, 70))
    with torch.no_grad():
        whole, after = net(tokens, net.zero_state(2))
        first, between = net(tokens[:, :37], net.zero_state(2))
        second, end = net(tokens[:, 37:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(sum(end, ()), sum(after, ()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "WORTH_THREADS", 1)
    inputs = [torch.randn(size) for size in ((3, 40, 80), (3, 3, 20), (3, 20), (20, 4), (20,), (20,), (20,))]
    leaves = [each.abs().requires_grad_() for each in inputs]
    x, past, state, weight, r_bias, i_bias, rate = leaves

    def found() -> list[Tensor]:
        outputs = functions.short_memory(x, past, state, weight, (r_bias, i_bias), rate, None)
        gradients = torch.autograd.grad(torch.stack([each.sin().sum() for each in outputs]).sum(), leaves)
        return [*outputs, *gradients]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = found()
        torch.set_num_threads(2)
        two = found()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, two, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_its_share_and_its_gradients(dtype: torch.dtype) -> None:
    x, y = torch.zeros(4, 50, 64), torch.ones(4, 50, 64, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    total = dispatch.dropout_add(x, y, 0.25)
    (grad,) = torch.autograd.grad(total, y, torch.ones_like(total))
    assert set(total.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert torch.equal(grad, total.to(dtype))
    assert abs((total == 0).float().mean().item() - 0.25) < 0.02
    for axis in range(3):  # each row, token and channel has about its share, too
        assert (total == 0).float().mean([other for other in range(3) if other != axis]).sub(0.25).abs().max() < 0.15
    assert not torch.equal(total, dispatch.dropout_add(x, y, 0.25))
    torch.manual_seed(3)
    assert torch.equal(total, dispatch.dropout_add(x, y, 0.25))
    assert torch.equal(dispatch.dropout_add(x, y, 0.0), x + y)


@needs_compiler
def test_what_is_not_finite_stays_so() -> None:
    net, tokens = made(FORMS[0]), torch.randint(11, (1, 5))
    with torch.no_grad():
        net.get_parameter("blocks.0.memory.project.weight")[0, 0] = torch.nan
        assert net(tokens, net.zero_state(1))[0].isnan().all()


@needs_compiler
def test_kernels_are_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    assert dispatch.choose_native()
    kept = [path.suffix for path in tmp_path.rglob("kernels-*")]
    assert kept == [".so", ".so"]  # of float32 and of bfloat16
    monkeypatch.setattr(build, "_build", None)  # a second compilation would fail
    build.library.cache_clear()
    assert dispatch.choose_native()


def test_every_source_is_in_a_library_and_only_where_it_is_asked_for() -> None:
    used = {name for names in build.SOURCES.values() for name in names}
    assert used == {path.stem for path in build.FOLDER.glob("*.c")}
    assert not {"muon", "products", *build.SOURCES[build.LEARNING]} & {*build.SOURCES[torch.float32]}


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/nowhere/cc", "CC is /nowhere/cc, and there is no such compiler"),
        ('gcc "', 'CC is gcc ", and there is no such compiler'),
        ("", "there is no C compiler; install gcc or clang"),
        ("false", "false failed: exit status 1"),
    ],
)
def test_without_a_compiler_torch_computes(
    compiler: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    build.library.cache_clear()
    assert not dispatch.choose_native()
    assert dispatch.native_problem() == says
    net = made(FORMS[0])
    assert net(torch.zeros(1, 3, dtype=torch.int64), net.zero_state(1))[0].isfinite().all()
    assert not list(tmp_path.rglob("kernels-*"))


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the compiler a program that notes its calls in a file, and fails once `go` is beside it; return it."""
    if sys.platform == "win32":
        pytest.skip("needs a shell")
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f"#!/bin/sh\necho called >> {calls}\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done\necho no >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_a_compilation_that_failed_is_not_repeated(failing: Path) -> None:
    failing.with_name("go").touch()
    build.library.cache_clear()
    assert build.library(torch.float32) is None
    calls = failing.read_text()
    assert build.problem() == f"{failing.with_name('compiler')} failed: no"
    build.library.cache_clear()
    assert build.library(torch.float32) is None
    assert failing.read_text() == calls


def test_a_program_that_ends_while_kernels_are_compiled_leaves_without_a_word(failing: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from mmrec.model.ops.native import build
calls = Path(sys.argv[1])
build.begin()
while not calls.exists():
    time.sleep(0.01)
time.sleep(0.5)
print(len(calls.read_text().splitlines()))
calls.with_name("go").touch()
raise SystemExit(7)
"""
    ended = subprocess.run([sys.executable, "-c", program, str(failing)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (7, "")
    assert 1 <= int(ended.stdout) <= max(1, available_cores())


@pytest.mark.skipif(sys.platform != "linux", reason="the cache is elsewhere")
def test_without_a_cache_kernels_are_kept_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder = tmp_path / "file"
    no_folder.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = tmp_path / f"mmrec-{os.getuid()}"
    assert build._cache_folder() == kept
    assert kept.stat().st_mode & 0o777 == 0o700
    kept.chmod(0o777)
    build.library.cache_clear()
    assert build.library(torch.float32) is None
    assert f"others may write into {kept}" in str(build.problem())


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    build.library.cache_clear()
    assert not dispatch.choose_native()
    assert dispatch.native_problem() is None


@needs_compiler
def test_a_run_keeps_to_the_kernels_it_began_with_and_says_so_where_it_cannot(
    mmrec: Command, prepared: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(run: str, steps: int, *options: str) -> bool:
        build.library.cache_clear()
        assert (
            mmrec(*fit(prepared, f"--run={run}", "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", *options))
            == 0
        )
        return bool(last(run)["mmrec_progress"]["native"])

    assert trained("with", 2)
    monkeypatch.setenv(build.SWITCH, "0")
    assert not trained("without", 2)
    assert not trained("with", 4, "--ckpt_path=last")
    assert "compiled kernels until now, and goes on without: MMREC_NATIVE=0" in caplog.text
    monkeypatch.delenv(build.SWITCH)
    assert not trained("without", 4, "--ckpt_path=last")
    assert caplog.text.count("until now") == 1


@needs_compiler
def test_a_layer_is_computed_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called, kernel = set(), functions._kernel

    def noted(name: str, dtype: torch.dtype) -> object:
        called.add(name)
        return kernel(name, dtype)

    monkeypatch.setattr(functions, "_kernel", noted)
    config = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)
    net = RecurrentLM(config, 11, dropout=0.1)
    net(torch.zeros(1, 5, dtype=torch.int64), net.zero_state(1))[0].sum().backward()
    forward = {"rms_norm", "swiglu", "short_memory", "long_memory", "dropout_add"}
    assert called == forward | {f"{name}_backward" for name in forward}


@needs_tiles
@pytest.mark.parametrize("shape", [(128, 128), (96, 32), (32, 96), (70, 33), (13, 130), (130, 13), (1, 5), (5, 1)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_orthogonalizes_as_exactly_as_torch(shape: tuple[int, int], nesterov: bool) -> None:
    gradient, average, coefficients = torch.randn(shape), torch.randn(shape), (3.4445, -4.7750, 2.0315)
    after = average.lerp(gradient, 0.05)
    direction = gradient.lerp(after, 0.95) if nesterov else after
    exact = orthogonalize(direction.double()[None], coefficients, 5, 1e-7)[0]
    of_torch = orthogonalize(direction.bfloat16()[None], coefficients, 5, 1e-7)[0]

    # Two matrices, of which another process orthogonalizes the first.
    other, updates = average.clone(), torch.full((3 + gradient.numel(),), 7, dtype=torch.bfloat16)
    how = muon.Momentum(5, nesterov, *coefficients, 1e-7, 0.95)
    muon.orthogonalize(how, [gradient, gradient], [other, average], [-1, 3], updates)
    torch.testing.assert_close(average, after)
    assert torch.equal(other, average)
    assert (updates[:3] == 7).all()
    ours = updates[3:].view(shape)

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert 0 < error(ours) < 1.2 * error(of_torch) + 1e-3
    weights = torch.randn(shape), torch.randn(2)
    expected = [0.9 * weights[0] - 0.01 * ours.float(), 0.9 * weights[1] - 7 * 0.02]
    muon.apply(weights, 0.9, [0.01, 0.02], [3, 0], updates)
    torch.testing.assert_close(weights, tuple(expected))


@needs_tiles
def test_threads_share_out_the_matrices_of_muon_to_the_same_bits() -> None:
    how, shapes = (
        muon.Momentum(5, True, 3.4445, -4.7750, 2.0315, 1e-7, 0.95),
        [(40, 70), (64, 64), (9, 90), (300, 20)],
    )
    gradients, starts = [torch.randn(shape) for shape in shapes], [0, 2800, -1, 6896]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            averages, updates = [torch.ones(shape) for shape in shapes], torch.zeros(12896, dtype=torch.bfloat16)
            muon.orthogonalize(how, gradients, averages, starts, updates)
            found.append((*averages, updates))
    finally:
        torch.set_num_threads(before)
    for several in found[1:]:
        assert all(one.equal(other) for one, other in zip(found[0], several, strict=True))
    assert all(found[0][-1][start : start + 100].any() for start in starts if start >= 0)


@needs_tiles
def test_muon_leaves_zeros_and_says_nothing_of_numbers_that_are_not_finite() -> None:
    how, update = muon.Momentum(5, True, 3.4445, -4.7750, 2.0315, 1e-7, 0.95), torch.ones(24 * 40).bfloat16()
    muon.orthogonalize(how, [torch.zeros(24, 40)], [torch.zeros(24, 40)], [0], update)
    assert not update.any()
    muon.orthogonalize(how, [torch.full((24, 40), torch.nan)], [torch.zeros(24, 40)], [0], update)
    assert update.isnan().all()
