"""Generating, reading, learning, counting, scoring and serving on the simulated CUDA device, against the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from models import SHORT_AND_LONG, content, made
from phantom import cuda
from serving import make_service, running
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmrec.bench.compare import machine
from mmrec.bench.measurements import decode_speed, peak_memory, read_speed, train_speed
from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.state_file import SavedState, load_memory, save_memory
from mmrec.core import devices
from mmrec.core.devices import find_device
from mmrec.core.errors import UserError
from mmrec.evals.carry import compare
from mmrec.evals.length import by_position
from mmrec.evals.planted import PlantedOptions, nll_on_return
from mmrec.evals.retention import retention
from mmrec.evals.tasks import Parity
from mmrec.evals.training import Recipe, train
from mmrec.inference.decoders import CAPTURE_PAYS
from mmrec.inference.generate import generate_tokens
from mmrec.inference.metrics import TextMetrics
from mmrec.inference.reading import Reader
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import RecurrentLM, State
from mmrec.model.captured import StaticStep
from mmrec.model.without_autograd import fixed_length
from mmrec.tokenizers import CharacterTokenizer
from mmrec.training.metrics import TextScore

pytestmark = pytest.mark.simulated_cuda

TOKENIZER = CharacterTokenizer("abcdefgh \n")


@pytest.fixture(autouse=True)
def float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learn from what is read in float32 on the CPU, too, where a processor multiplies bfloat16."""
    monkeypatch.setattr(fixed_length, "has_tiles", lambda: False)


class _NoFloat64(TorchDispatchMode):
    """Fails where a number of 64 bits is asked for on another device than the CPU, as MPS would."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_iter((args, kwargs, found)):
            if isinstance(x, Tensor) and x.device.type != "cpu" and x.dtype == torch.float64:
                raise AssertionError(f"float64 on {x.device}: {func}")
        return found


@contextmanager
def as_on_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the simulated device be one that has no float64."""
    with monkeypatch.context() as patch, _NoFloat64():
        patch.setattr(devices, "NO_FLOAT64", frozenset({"cuda"}))
        yield


def on_both() -> tuple[RecurrentLM, RecurrentLM]:
    """Return the same model on the CPU and on the device."""
    net = made(TOKENIZER).net
    return net, copy.deepcopy(net).to("cuda")


def text(count: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, count)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_a_memory_is_the_same_on_both_and_goes_from_one_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: bool, cache: bool
) -> None:
    nets, prompt = on_both(), torch.tensor([1, 2, 3])
    options = SamplingOptions(12, verbatim=8 if cache else 0)
    losses, written = [], []
    for net in nets:
        memory = SavedState.empty(net)
        memory = memory.learning(net) if learn else memory
        reader = Reader(net, memory.caching(1) if cache else memory)
        with as_on_mps(monkeypatch):
            losses.append(torch.cat([part.nll for part in reader.read(text())]))
            written.append(list(generate_tokens(net, prompt, options, reader.memory)))
        save_memory(tmp_path / "a.mem", reader.memory, "hash")
        for other in nets:
            back = load_memory(tmp_path / "a.mem", other, "hash")
            assert back.logits.device == other.head.weight.device
            written.append(list(generate_tokens(other, prompt, options, back)))
    assert all(tokens == written[0] for tokens in written)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_sums_of_scores_need_no_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    nll, lengths = torch.rand(9, device="cuda"), torch.ones(9, 2, dtype=torch.int64, device="cuda")
    expected = TextMetrics()
    expected.update(nll.cpu(), lengths.cpu())
    for metrics in (TextMetrics(), TextScore()):
        with as_on_mps(monkeypatch):
            if isinstance(metrics, TextScore):
                metrics.to("cuda")  # as Lightning moves a module's metrics
            metrics.update(nll, lengths)
            figures = {name: float(value) for name, value in metrics.compute().items()}
        assert figures == {name: float(value) for name, value in expected.compute().items()}
    on_cuda = TextScore().to("cuda")
    on_cuda.update(nll, lengths)
    assert on_cuda.compute()["loss"].device.type == "cuda"  # which has such numbers, and waits for nothing


def test_the_commands_take_the_device(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(content(made(TOKENIZER).net, TOKENIZER), tmp_path / "a.ckpt")
    (tmp_path / "text.txt").write_text(TOKENIZER.decode(text(200).tolist()))
    printed: dict[str, str] = {}
    for device in ("cpu", "cuda:0", "auto"):
        model = ["--ckpt=a.ckpt", f"--device={device}"]
        assert mmrec("generate", *model, "--length=30", "--prompt=abc") == 0
        assert mmrec("score", "text.txt", *model, "--learn") == 0
        assert mmrec("eval", "carry", *model, "--files=[text.txt]", "--window=32") == 0
        printed[device] = capsys.readouterr().out
        assert mmrec("read", "text.txt", *model, "--save=a.mem", "--learn") == 0
        assert mmrec("export", *model, "--format=safetensors", "--memory=a.mem", f"--output_dir={device}") == 0
        capsys.readouterr()
    assert printed["cpu"] == printed["cuda:0"] == printed["auto"]
    assert mmrec("generate", "--ckpt=a.ckpt", "--device=cuda:1") == 2
    assert "there is one CUDA device, from cuda:0 on" in capsys.readouterr().err
    assert find_device("auto") == torch.device("cuda")


def test_a_server_answers_from_the_device(tmp_path: Path) -> None:
    trained = made(TOKENIZER)
    answers = []
    for device in ("cpu", "cuda"):
        trained.net.to(device)
        with running(make_service(trained, tmp_path / device)) as client:
            read = client.good(
                "POST", "/v1/memories", {"name": "a", "text": "abcabc" * 30, "learn": True, "cache": 1}
            )
            asked = {"prompt": "abc", "seed": 1, "max_tokens": 12, "memory": "a", "logprobs": 2, "echo": True}
            written = client.complete(**asked)["choices"][0]
            scored = client.good("POST", "/v1/score", {"text": "abc abc", "memory": "a"})
        answers.append((read["position"], written["text"], written["logprobs"]["tokens"], scored["nats"]))
    assert answers[0][:3] == answers[1][:3]
    assert answers[0][3] == pytest.approx(answers[1][3], abs=1e-3)


def test_evaluations_give_the_figures_of_the_cpu() -> None:
    trained, tokens = made(TOKENIZER), text(400)
    found = []
    for device in ("cpu", "cuda"):
        net = trained.net.to(device)
        planted = PlantedOptions(Path(), (8, 24), phrase=8, cue=3, rows=2, lead=16)
        known, unknown = nll_on_return(net, planted.plant(tokens, False), 16, [8, 24])
        kept = retention(net, torch.from_numpy(tokens), [1, 4])
        carried = compare(trained, tokens, 32)
        found.append(
            [
                *(float(x.mean()) for x in (known, unknown)),
                *(carried[name] for name in ("windowed", "carried", "learned")),
                *(by_position(net, tokens.astype(np.int64), [1, 40], 2).mean(1)),
                *(value for head in kept.values() for value in (*head["left"], head["keys"])),
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    recipe = Recipe(Parity, SHORT_AND_LONG, (4,), (4, 8), steps=2, tokens=64, test_rows=4)
    assert train("mmrec", recipe, 0, torch.device("cuda"))["accuracy"].keys() == {"4", "8"}


@pytest.mark.parametrize("baseline", ["mmrec", "gpt"])
def test_bench_measures_on_the_device(baseline: str) -> None:
    before = peak_memory("cuda")
    speed = train_speed(baseline, 16, 11, 0, "bf16-mixed", step_tokens=32, device="cuda")
    assert speed["tokens_per_second"] > 0
    assert decode_speed(baseline, 20, 11, 0, tokens=3, device="cuda")["state_bytes"] > 0
    assert read_speed(baseline, 16, 11, device="cuda")["peak_bytes"][-1] >= before
    assert machine(1, torch.device("cuda"))["cuda"]["capability"]


def test_a_model_that_was_trained_on_the_device_is_read_on_the_cpu_first(tmp_path: Path) -> None:
    net = RecurrentLM(SHORT_AND_LONG, 3).eval().to("cuda")
    write_checkpoint(content(net), tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt").net.embedding.weight.device.type == "cpu"
    with pytest.raises(UserError, match="CUDA"):
        find_device("cuda:7")


@torch.inference_mode()
def test_a_step_is_one_launch_at_addresses_that_stay() -> None:
    net, on_device = on_both()
    tokens = torch.from_numpy(text(6)).view(2, 3)
    step = StaticStep(on_device, 2)
    assert step.is_captured
    addresses = [x.data_ptr() for x in (step.tokens, step.logits, *chain.from_iterable(step.state))]
    state = net.zero_state(2)
    step.set_state(state)
    for column in tokens.T:
        step.tokens.copy_(column[:, None])
        with cuda.counted() as counts:
            step.run()
        assert counts.kernels == {"graph": 1}
        assert not counts.waits
        logits, state = net(column[:, None], state)
        torch.testing.assert_close(step.logits.cpu(), logits[:, 0])
    for layer, expected in zip(step.state, state, strict=True):
        for kept, wanted in zip(layer, expected, strict=True):
            torch.testing.assert_close(kept.cpu(), wanted)
    assert [x.data_ptr() for x in (step.tokens, step.logits, *chain.from_iterable(step.state))] == addresses


def test_what_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, net = on_both()
    forward = RecurrentLM.forward

    def waiting(self: RecurrentLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        assert int(tokens.sum()) >= 0
        return forward(self, tokens, state)

    monkeypatch.setattr(RecurrentLM, "forward", waiting)
    step = StaticStep(net, 1)
    assert not step.is_captured
    assert capsys.readouterr().err.startswith("generating without a CUDA graph: operation not permitted")
    step.run()
    assert step.logits.abs().sum() > 0


def test_text_is_generated_by_captured_steps() -> None:
    net, on_device = on_both()
    options = SamplingOptions(CAPTURE_PAYS + 6)
    prompt = torch.tensor([1, 2, 3])
    with cuda.counted() as counts:
        written = list(generate_tokens(on_device, prompt, options))
    assert counts.kernels["graph"] == options.length - 1
    assert written == list(generate_tokens(net, prompt, options))
