"""The model in onnxruntime: step for step it gives our logits and our state."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_text
from models import made

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState, model_hash, save_memory
from mmrec.inference.generate import generate_tokens
from mmrec.inference.reading import iter_nll
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig
from mmrec.tokenizers import CharacterTokenizer

SHAPE = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, negative_eigenvalues=True, count_half_lives=(20, 300))
State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A model whose memories last from a token to millions, and the folder of its export; that takes some seconds."""
    from mmrec.export import onnx

    folder = tmp_path_factory.mktemp("onnx")
    trained = made(CharacterTokenizer(make_text()), SHAPE)
    onnx.save(folder, trained)
    return trained, folder


def opened(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def zero_state(session: Any, rows: int) -> State:
    return {tensor.name: np.zeros([rows, *tensor.shape[1:]], np.float32) for tensor in session.get_inputs()[1:]}


def close(one: np.ndarray, other: torch.Tensor) -> None:
    np.testing.assert_allclose(one, other.numpy(), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_many_steps_give_our_logits_and_our_state(exported: tuple[LoadedModel, Path]) -> None:
    """Against float64: what is lost where a decay is close to 1 would grow step by step."""
    trained, folder = exported
    exact, session = copy.deepcopy(trained.net).double(), opened(folder)
    names = [tensor.name for tensor in session.get_outputs()]
    assert names == ["logits", *(f"next.{tensor.name}" for tensor in session.get_inputs()[1:])]
    for rows in (1, 3):
        state = zero_state(session, rows)
        tokens = torch.randint(trained.tokenizer.vocab_size, (rows, 600))
        with torch.no_grad():
            whole, after = exact(tokens, exact.zero_state(rows))
        for place in range(600):
            step = tokens[:, place : place + 1].numpy()
            logits, *states = session.run(None, {"tokens": step, **state})
            state = dict(zip(state, states, strict=True))
            close(logits, whole[:, place])
        for found, expected in zip(state.values(), (part for layer in after for part in layer), strict=True):
            assert found.shape == expected.shape
            close(found, expected)


@pytest.mark.slow
def test_the_file_says_which_model_it_is(exported: tuple[LoadedModel, Path]) -> None:
    trained, folder = exported
    said = opened(folder).get_modelmeta().custom_metadata_map
    assert said["format"] == "mmrec-onnx"
    assert said["model"] == model_hash(trained.net, trained.tokenizer)


@pytest.mark.slow
def test_a_memory_is_a_state(exported: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    trained, folder = exported
    *_, (_, memory) = iter_nll(
        trained.net, trained.tokenizer.encode(make_text()[:500]), SavedState.empty(trained.net)
    )
    save_memory(tmp_path / "book.mem", memory, "hash")
    kept, session = load_file(tmp_path / "book.mem"), opened(folder)
    state = {name: kept[name] for name in zero_state(session, 1)}
    logits = session.run(["logits"], {"tokens": np.array([[3]]), **state})[0]
    with torch.no_grad():
        close(logits[0], trained.net(torch.tensor([[3]]), memory.state)[0][0, 0])


@pytest.mark.slow
def test_the_documentation_s_program_writes_our_text(
    exported: tuple[LoadedModel, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained, folder = exported
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in block)
    assert "torch" not in program
    assert "mmrec" not in program
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onnx").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("It was", "to be"), {})
    prompt = torch.from_numpy(trained.tokenizer.encode("to be").astype("int64"))
    written = list(generate_tokens(trained.net, prompt, SamplingOptions(200 + 1 - len(prompt), temperature=0)))
    assert capsys.readouterr().out == "to be" + trained.tokenizer.decode(written) + "\n"


def greedy(session: Any, prompt: list[int], length: int) -> list[int]:
    tokens, state = list(prompt), zero_state(session, 1)
    for place in range(len(prompt) + length - 1):
        logits, *states = session.run(None, {"tokens": np.array([[tokens[place]]]), **state})
        state = dict(zip(state, states, strict=True))
        if place + 1 == len(tokens):
            tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_inputs_that_do_not_fit_are_refused(exported: tuple[LoadedModel, Path]) -> None:
    trained, folder = exported
    session, size = opened(folder), trained.tokenizer.vocab_size
    state = zero_state(session, 1)
    for tokens in ([[size]], [[-1]], [[-size]], [[0, 1]], [[0], [1]], [0]):
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT|FAIL"):
            session.run(None, {"tokens": np.array(tokens), **state})
    with pytest.raises(Exception, match="int32"):
        session.run(None, {"tokens": np.array([[0]], dtype=np.int32), **state})


@pytest.mark.slow
def test_weights_beside_the_file_move_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec.export import onnx

    trained = made(CharacterTokenizer(make_text()), SHAPE)
    monkeypatch.setattr(onnx, "MAX_EMBEDDED_BYTES", 0)
    (tmp_path / "out").mkdir()
    onnx.save(tmp_path / "out", trained)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    written = list(generate_tokens(trained.net, torch.tensor([3]), SamplingOptions(30, temperature=0)))
    assert greedy(opened(tmp_path / "moved"), [3], 30) == written


@pytest.mark.slow
def test_without_a_convolution_and_quantized(tmp_path: Path) -> None:
    """A state of size 0, and weights of 8 bits: the state stays float32."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    from mmrec.export import onnx

    trained = made(CharacterTokenizer(make_text()), ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, conv_width=1))
    onnx.save(tmp_path, trained)
    written = list(generate_tokens(trained.net, torch.tensor([3]), SamplingOptions(30, temperature=0)))
    whole = opened(tmp_path)
    assert greedy(whole, [3], 30) == written
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    small = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    assert small.get_modelmeta().custom_metadata_map["model"] == model_hash(trained.net, trained.tokenizer)
    states, logits = [zero_state(whole, 1), zero_state(small, 1)], []
    for token in written:
        for number, session in enumerate((whole, small)):
            found, *after = session.run(None, {"tokens": np.array([[token]]), **states[number]})
            states[number] = dict(zip(states[number], after, strict=True))
            logits.append(found)
    assert all(part.dtype == np.float32 for part in states[1].values())
    apart = [np.abs(one - other).mean() for one, other in zip(logits[::2], logits[1::2], strict=True)]
    assert np.mean(apart) < 0.1 * np.std(logits)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "share", "most"), [("f16", 0.75, 0.002), ("int8", 0.65, 0.05)])
def test_matrices_of_fewer_bits(
    exported: tuple[LoadedModel, Path], weights: str, share: float, most: float, tmp_path: Path
) -> None:
    """The file is smaller, the state stays float32, and the logits are ours nearly."""
    from mmrec.export import onnx

    _, folder = exported
    config = ModelConfig(dim=64, layers=2, heads=2, ffn_dim=128)
    trained = made(CharacterTokenizer(make_text()), config)
    onnx.save(tmp_path, trained, weights)
    session = opened(tmp_path)
    assert session.get_modelmeta().custom_metadata_map["model"] == model_hash(trained.net, trained.tokenizer)
    numbers = 4 * trained.net.parameter_count()
    assert (tmp_path / "model.onnx").stat().st_size < share * numbers + (folder / "model.onnx").stat().st_size
    state, tokens = zero_state(session, 1), torch.randint(trained.tokenizer.vocab_size, (1, 60))
    with torch.no_grad():
        whole, _ = trained.net(tokens, trained.net.zero_state(1))
    found = []
    for place in range(60):
        logits, *after = session.run(None, {"tokens": tokens[:, place : place + 1].numpy(), **state})
        state = dict(zip(state, after, strict=True))
        found.append(logits)
    assert all(part.dtype == np.float32 for part in state.values())
    apart = np.abs(np.stack(found, axis=1) - whole.numpy()).mean() / float(whole.std())
    assert 0 < apart < most
