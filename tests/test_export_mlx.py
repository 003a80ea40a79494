"""The model in MLX, on its CPU backend: the code that travels with it gives our logits and our text."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Command, make_text
from isolated import link_packages, run_isolated
from models import made

from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.state_file import model_hash
from mmrec.core.errors import UserError
from mmrec.export import mlx
from mmrec.inference.generate import generate_tokens
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import LAYER_TYPES, ModelConfig
from mmrec.model.token_counts import READ_BEFORE, SPAN
from mmrec.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer

CONFIG = ModelConfig(
    dim=16,
    layers=3,
    layer_types=("short", "long", "portable"),
    heads=2,
    ffn_dim=24,
    count_half_lives=(10, 300.5),
)
needs_mlx = pytest.mark.skipif(find_spec("mlx") is None, reason="mlx is not installed")


def counting(tokenizer: Tokenizer) -> LoadedModel:
    """Make a model of CONFIG with gates that differ, and tokens of frequencies beyond what the counts reckon with."""
    trained = made(tokenizer, CONFIG)
    counts = trained.net.counts
    assert counts is not None
    with torch.no_grad():
        counts.strength.div_(-3)  # what was written becomes less likely: a text goes on to vary
        for parameter in counts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        counts.log_frequency[:2] = torch.tensor([-25.0, 25.0])
    return trained


@needs_mlx
@pytest.mark.parametrize(
    "config",
    [CONFIG, ModelConfig(dim=16, heads=2, ffn_dim=24, tie_embeddings=False, conv_width=1, negative_eigenvalues=True)],
)
def test_mlx_gives_our_logits_read_in_parts_and_token_by_token(config: ModelConfig, tmp_path: Path) -> None:
    """Against float64: what is lost where a decay is close to 1 would grow token by token."""
    import mlx.core as mx

    from mmrec.export import mlx_model

    trained = counting(ByteTokenizer()) if config.count_half_lives else made(ByteTokenizer(), config)
    mlx.save(tmp_path, trained)
    model, _ = mlx_model.load(tmp_path)
    tokens = torch.randint(256, (3, 200))
    exact = trained.net.double()
    with torch.no_grad():
        whole, after = exact(tokens, exact.zero_state(3))
    cache = model.make_cache(3)
    parts = tokens.split([139, SPAN, 2, 7, *[1] * 20], dim=1)
    found = [model(mx.array(part.numpy()), cache) for part in parts]
    np.testing.assert_allclose(np.array(mx.concatenate(found, axis=1)), whole.numpy(), atol=1e-3, rtol=0)
    for layer, expected in zip(cache, after, strict=True):
        for part, ours in zip(layer.state, expected, strict=True):
            np.testing.assert_allclose(np.array(part), ours.numpy(), atol=1e-3, rtol=1e-3)


@needs_mlx
def test_a_state_of_ours_is_gone_on_with(tmp_path: Path) -> None:
    """Of texts that stand at other places of a span, and of one that was reset in it."""
    import mlx.core as mx

    from mmrec.export import mlx_model

    trained = counting(ByteTokenizer())
    mlx.save(tmp_path, trained)
    model, _ = mlx_model.load(tmp_path)
    net, tokens = trained.net, torch.randint(256, (3, 160))
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[2, 55] = True
    with torch.no_grad():
        alone = [
            net(tokens[row : row + 1, :begun], net.zero_state(1), resets[row : row + 1, :begun])[1]
            for row, begun in enumerate((7, SPAN, 60))
        ]
        before = [tuple(map(torch.cat, zip(*layers, strict=True))) for layers in zip(*alone, strict=True)]
        assert (before[-1][0] == READ_BEFORE).any()
        expected, after = net(tokens[:, 60:], before)
    cache = [mlx_model.LayerState(*(mx.array(part.numpy()) for part in layer)) for layer in before]
    found = [model(mx.array(part.numpy()), cache) for part in tokens[:, 60:].split([30, 1, 69], dim=1)]
    np.testing.assert_allclose(np.array(mx.concatenate(found, axis=1)), expected.numpy(), atol=1e-3, rtol=0)
    for part, ours in zip(cache[-1].state, after[-1], strict=True):
        np.testing.assert_allclose(np.array(part), ours.numpy(), atol=1e-3, rtol=1e-3)


@needs_mlx
def test_the_folder_writes_our_text_where_mlx_and_tokenizers_are_all_there_is(tmp_path: Path) -> None:
    """An interpreter that finds these two packages alone, and no C++ compiler, which MLX would use."""
    trained = counting(CharacterTokenizer(make_text()))
    (tmp_path / "out").mkdir()
    mlx.save(tmp_path / "out", trained)
    link_packages(tmp_path / "packages", "mlx", "mlx-cpu", "tokenizers")
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "mlx_model" in block)

    def written(*arguments: str, program: str = "import mlx_model; mlx_model.main()") -> tuple[int, str, str]:
        done = run_isolated(program, tmp_path / "packages", *arguments, cwd=tmp_path / "out", PATH="")
        return done.returncode, done.stdout, done.stderr

    prompt = torch.from_numpy(trained.tokenizer.encode("to be").astype("int64"))
    ours = list(generate_tokens(trained.net, prompt, SamplingOptions(200, temperature=0)))
    text = "to be" + trained.tokenizer.decode(ours) + "\n"
    assert written("to be") == (0, text, "")
    assert written(program=program.replace("It was", "to be")) == (0, text, "")
    for arguments in (["\N{SNOWMAN}"], [""], ["to be", "--temperature", "-1"]):
        status, out, error = written(*arguments)
        assert (status, out) == (2, "")
        assert ": error: " in error.splitlines()[-1]


@needs_mlx
def test_tokens_of_no_model_s_are_refused_and_what_is_drawn_can_be_drawn_again(tmp_path: Path) -> None:
    import mlx.core as mx

    from mmrec.export import mlx_model

    mlx.save(tmp_path, made(ByteTokenizer(), CONFIG))
    model, _ = mlx_model.load(tmp_path)
    for prompt in ([256], [-1], []):
        with pytest.raises(ValueError, match="tokens from 0 to 255"):
            next(mlx_model.generate(model, prompt, 1))
    mx.disable_compile()  # it would call a C++ compiler
    try:
        texts = []
        for seed in (0, 0, 1):
            mx.random.seed(seed)
            texts.append(list(mlx_model.generate(model, [3], 20, temperature=1.0)))
    finally:
        mx.enable_compile()
    assert texts[0] == texts[1] != texts[2]


@needs_mlx
def test_the_code_has_the_layers_that_are_exported() -> None:
    from mmrec.export import mlx_model

    assert set(mlx_model.LAYER_TYPES) == set(mlx.LAYER_TYPES)


def test_a_layer_without_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_TYPES, "yours", LAYER_TYPES["short"])
    with pytest.raises(UserError, match="the model has yours layers"):
        mlx.save(tmp_path, made(ByteTokenizer(), ModelConfig(dim=16, layers=1, layer_types=("yours",), heads=2)))
    assert not list(tmp_path.iterdir())


def test_the_weights_are_a_model_file_of_mmrec_too(tmp_path: Path) -> None:
    trained = made(ByteTokenizer(), CONFIG)
    mlx.save(tmp_path, trained)
    back = load_model(tmp_path / "model.safetensors")
    assert model_hash(back.net, back.tokenizer) == model_hash(trained.net, trained.tokenizer)


def test_the_command_writes_the_folder_and_replaces_it_if_asked(
    mmrec: Command, prepared_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", "--format", "mlx", "--output_dir", "out")
    assert mmrec(*command) == 0
    assert "config.json, mlx_model.py, model.safetensors, tokenizer.json" in capsys.readouterr().out
    assert mmrec(*command) == 2
    assert mmrec(*command, "--force") == 0
    assert mmrec(*command, "--force", "--weights", "f16") == 2
    assert "--weights f16: --format mlx takes f32" in capsys.readouterr().err


@pytest.fixture
def prepared_run(mmrec: Command) -> None:
    from helpers import checkpoints
    from models import content

    from mmrec.checkpoints.checkpoint import write_checkpoint

    trained = made(ByteTokenizer(), CONFIG)
    write_checkpoint(content(trained.net, trained.tokenizer), checkpoints("a") / "best.ckpt")
