"""The comparison with other models: they are what they say, and nothing is timed that computes something else."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from torch import Tensor

from mmrec.baselines.models import BASELINES, GPT, LSTM, make_baseline, size
from mmrec.bench import compare, cores, measurements
from mmrec.bench.check import check_ops
from mmrec.bench.compare import Runner
from mmrec.bench.measurements import TIME_TO_TARGET, LearningOptions, learning
from mmrec.bench.tables import at_time, ratios, time_to
from mmrec.model.ops import chunked
from mmrec.model.ops.native import functions


def test_gpt_is_gpt2() -> None:
    """The same weights give the logits of HF's GPT-2."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 65, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, **dropouts, activation_function="gelu", attn_implementation="eager")
    ).eval()
    ours = GPT(65, 32, dim=48, layers=2, heads=4, bias=True)
    names = (
        ("attn.c_proj", "output"), ("attn.c_attn", "project"),
        ("mlp.c_fc", "ffn.input"), ("mlp.c_proj", "ffn.output"),
        ("ln_1", "attention_norm"), ("ln_2", "ffn_norm"), ("ln_f", "norm"),
        ("wte", "tokens"), ("wpe", "positions"), ("h.", "blocks."),
    )  # fmt: skip
    weights = {}
    for name, value in theirs.transformer.state_dict().items():
        matrix = name.startswith("h.") and value.dim() == 2  # GPT-2 keeps these transposed
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = value.T if matrix else value
    weights["head.weight"] = weights["tokens.weight"]
    ours.load_state_dict(weights)
    tokens = torch.randint(65, (3, 32))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: GPT(11, 40, dim=16, layers=2), lambda: LSTM(11, 16)])
def test_reading_in_parts_is_reading_at_once(make: Callable[[], GPT | LSTM]) -> None:
    model = make().eval()
    tokens = torch.randint(11, (2, 40))

    def read(*parts: int) -> Tensor:
        state = model.zero_state(2, 40) if isinstance(model, GPT) else model.zero_state(2)
        logits = []
        for part in tokens.split(parts, dim=1):
            out, state = model(part, state)
            logits.append(out)
        return torch.cat(logits, dim=1)

    torch.testing.assert_close(read(1, 1, 20, 1, 17), read(40), atol=1e-5, rtol=1e-4)
    if isinstance(model, GPT):
        torch.testing.assert_close(model(tokens)[0], read(40), atol=1e-5, rtol=1e-4)


# Where Triton is installed, xlstm imports torch's compiler, which warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_of_equal_size_and_predict_from_the_past(name: str) -> None:
    baseline = BASELINES[name]
    if baseline.package is not None:
        pytest.importorskip(baseline.package)
    model: Any = make_baseline(name, 65, 64).eval()
    assert 0.9 < size(model) / 800_000 < 1.1
    tokens = torch.randint(65, (1, 64))
    other = tokens.clone()
    other[:, 40] = (other[:, 40] + 1) % 65
    state = None if isinstance(model, GPT) else model.zero_state(1)
    with torch.no_grad():
        one, two = model(tokens, state)[0], model(other, state)[0]
    assert one.shape == (1, 64, 65)
    torch.testing.assert_close(one[:, :40], two[:, :40], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(one[:, 40:], two[:, 40:])
    with torch.no_grad():  # the end of a validation text has any length
        torch.testing.assert_close(model(tokens[:, :45], state)[0], one[:, :45], atol=1e-4, rtol=1e-3)


def test_an_op_that_differs_from_its_reference_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert max(check_ops().values()) < 1e-4
    right: Callable[..., tuple[Tensor, Tensor]] = chunked.gated_delta_rule

    def wrong(*args: Tensor) -> tuple[Tensor, Tensor]:
        outputs, state = right(*args)
        return outputs, state * 1.01

    monkeypatch.setattr(chunked, "gated_delta_rule", wrong)
    assert mmrec("bench") == 2
    assert "gated_delta_rule: the fast path differs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing")
def test_all_that_is_measured(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training in processes of their own, as all is measured; the rest in this one, which has imported everything."""
    measure = Runner.measure

    def measure_here(self: Runner, **request: Any) -> dict[str, Any]:
        if request["measurement"] == "train":
            return measure(self, **request)
        found: dict[str, Any] = measurements.MEASUREMENTS[request.pop("measurement")](**request)
        return found

    monkeypatch.setattr(Runner, "measure", measure_here)
    for name in ("mmrec", "gpt"):
        monkeypatch.setitem(TIME_TO_TARGET, name, {**TIME_TO_TARGET[name], "batch_size": 4, "max_tokens": 4_300})
    options = "--rounds=1 --seconds=0.01 --threads=1 --lengths=[64] --positions=[10,2048] --tokens=8000"
    measures = "--measures=[train,decode,read,learn,time_to_target]"
    assert mmrec("bench", *options.split(), measures, "--baselines=[gpt]", f"--data_dir={prepared}") == 0
    results = json.loads(Path("bench/results.json").read_text())
    for name in ("mmrec", "gpt"):
        for found in results["train"]:
            assert [run["updates"] >= 1 and run["working_bytes"] > 0 for run in found[name]] == [True]
        curve = results["learn"][name][0]["curve"]
        assert curve[-1]["loss"] < curve[0]["loss"]
        assert len(results["time_to_target"][name][0]["curve"]) >= 16
        assert results["time_to_target"][name][0]["curve"][-1]["tokens"] <= 4_300
    cache = [found["gpt"][0]["state_bytes"] for found in results["decode"]]
    state = [found["mmrec"][0]["state_bytes"] for found in results["decode"]]
    assert cache[1] > 25 * cache[0]  # 64 tokens are generated after each position
    assert state[0] == state[1]
    assert results["read"]["mmrec"][0]["seconds_per_token"][0] > 0
    assert "mmrec / gpt" in capsys.readouterr().out
    assert (
        len(measurements.read_speed("mmrec", 100, 65)["seconds_per_token"]) == 8
    )  # of fewer tokens than eight blocks
    assert Path("bench/results.png").read_bytes().startswith(b"\x89PNG")


def test_cores_are_measured_in_turn_alone_and_beside_a_neighbour(
    mmrec: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, bool]] = []
    running: list[bool] = [False]

    @contextlib.contextmanager
    def neighbour(wanted: bool) -> Iterator[None]:
        running[0] = wanted
        yield
        running[0] = False

    def measure(self: Runner, **request: Any) -> dict[str, Any]:
        count = request.get("processes", 1)
        assert (request["measurement"], request["length"]) == ("train" if count == 1 else "train_together", 64)
        asked.append((request["threads"], running[0]))
        return {"tokens_per_second": 100.0 * count * request["threads"] / (2 if running[0] else 1)}

    monkeypatch.setattr(Runner, "measure", measure)
    monkeypatch.setattr(cores, "neighbour", neighbour)
    monkeypatch.setattr(compare, "available_cores", lambda: 3)
    assert mmrec("bench", "--measures=[cores]", "--rounds=2", "--lengths=[64]") == 0
    rows = json.loads(Path("bench/results.json").read_text())["cores"]["rows"]
    assert [(row["kind"], row["number"]) for row in rows] == [
        ("threads", 1),
        ("threads", 2),
        ("threads", 3),
        ("processes", 2),
        ("processes", 3),
    ]
    assert len(asked) == 2 * 2 * 5
    assert asked[:4] == [(1, False), (1, True), (2, False), (2, True)]
    assert [run["tokens_per_second"] for run in rows[-1]["alone"]] == [300.0, 300.0]
    printed = capsys.readouterr().out
    assert "3 processes" in printed
    assert "0.50 (0.50 to 0.50)" in printed


@pytest.mark.skipif(not functions.is_built(), reason="there is no C compiler")
def test_processes_train_one_model_together() -> None:
    request = {"threads": 1, "device": "cpu", "baseline": "mmrec", "precision": "32-true", "seconds": 0.1}
    sizes = {"length": 64, "vocab_size": 65, "step_tokens": 256, "processes": 2}
    found = Runner(1).measure(measurement="train_together", **request, **sizes)
    assert found["tokens_per_second"] > 0


def test_a_neighbour_computes_until_it_is_no_longer_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "NEIGHBOUR", "import time; time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with cores.neighbour(False):
        assert not started
    with contextlib.suppress(KeyboardInterrupt), cores.neighbour(True):
        assert started[0].poll() is None
        raise KeyboardInterrupt
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--baselines=[gtp]", "did you mean 'gpt'"),
        ("--measures=[speed]", "no measure 'speed'"),
        ("--rounds=0", "at least 1"),
        ("--positions=[100,0]", "--positions is [100, 0]; it must list numbers of at least 8"),
        ("--lengths=[]", "--lengths is []"),
    ],
)
def test_a_wrong_request_is_refused(
    mmrec: Command, capsys: pytest.CaptureFixture[str], option: str, says: str
) -> None:
    assert mmrec("bench", option) == 2
    assert says in capsys.readouterr().err


def test_learning_is_the_same_again(prepared: Path) -> None:
    options = LearningOptions("mmrec", str(prepared), 10_240, seed=2, evaluations=2)
    runs = [learning(replace(options, seed=1)) for _ in range(2)]
    assert [point["loss"] for point in runs[0]["curve"]] == [point["loss"] for point in runs[1]["curve"]]
    other = learning(options)
    assert other["curve"] != runs[0]["curve"]


def test_figures_of_a_learning_curve() -> None:
    curve = [{"seconds": 10.0, "loss": 3.0}, {"seconds": 20.0, "loss": 2.0}, {"seconds": 30.0, "loss": 1.5}]
    assert at_time(curve, 25.0) == 2.0
    assert at_time(curve, 5.0) is None
    assert time_to(curve, 1.75) == pytest.approx(25.0)
    assert time_to(curve, 1.0) is None
    assert ratios([{"x": 4.0}, {"failed": "no"}], [{"x": 2.0}, {"x": 1.0}], "x") == [2.0]
