"""The page in which a model writes without a server, in a real browser and from a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Command
from models import TEXT, TOKENIZERS, made
from test_serve_page import browser

from mmrec.core.errors import UserError
from mmrec.export import web
from mmrec.inference.generate import generate_tokens
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig
from mmrec.tokenizers import Tokenizer

CONFIG = ModelConfig(dim=16, layers=3, layer_types=("short", "long", "portable"), heads=2, ffn_dim=24)


@pytest.fixture(scope="module")
def runtime() -> Path:
    """The files of onnxruntime-web, where npm has installed it in the repository or above."""
    try:
        return web.find_runtime(None, REPOSITORY)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


def opened(chromium: Any, folder: Path) -> Any:
    page = chromium.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((folder / "index.html").as_uri())
    page.wait_for_function("document.getElementById('status').textContent !== 'loading'", timeout=60_000)
    assert not problems
    return page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["characters", "bytes of documents", "bpe"])
def test_the_page_writes_our_text(name: str, runtime: Path, chromium: Any, tmp_path: Path) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]()
    trained = made(tokenizer, CONFIG)
    web.save(tmp_path, trained, runtime=runtime)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "model.js"}
    page = opened(chromium, tmp_path)
    assert page.inner_text("#status") == f"ready: {trained.net.parameter_count():,} parameters"
    prompt = TEXT.replace("\r", "").replace("\0", "")  # a text field has neither
    page.fill("#prompt", prompt)
    page.fill("#length", "40")
    page.fill("#temperature", "0")
    for _ in range(2):  # the second time from the beginning again
        page.click("#write")
        page.wait_for_function("document.getElementById('status').textContent.startsWith('done: 40 tokens')")
        tokens = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
        written = list(generate_tokens(trained.net, tokens, SamplingOptions(40, temperature=0)))
        expected = b"".join(tokenizer.token_bytes(token) for token in written).decode(errors="replace")
        assert page.text_content("#text") == prompt + expected
    if name == "characters":
        page.fill("#prompt", "Ω")
        page.click("#write")
        page.wait_for_selector("#status.bad")
        assert page.inner_text("#status") == "the character 'Ω' is not in the model's alphabet"
    page.close()


@pytest.mark.slow
def test_without_its_model_the_page_says_so(runtime: Path, chromium: Any, tmp_path: Path) -> None:
    web.save(tmp_path, made(TOKENIZERS["bytes"](), CONFIG), "int8", runtime)
    (tmp_path / "model.js").unlink()
    page = opened(chromium, tmp_path)
    assert page.inner_text("#status") == "model.js is not beside this page"
    page.close()


def test_without_onnxruntime_web_the_command_says_how_to_get_it(
    mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    arguments = ["--format=web", "--output_dir=out", f"--root={small_root}"]
    assert mmrec("export", *arguments, "--runtime=empty") == 2
    assert "there is no onnxruntime-web in empty: npm install onnxruntime-web" in capsys.readouterr().err
    assert not Path("out").exists()
    assert mmrec("export", "--format=onnx", "--runtime=empty", "--output_dir=out", f"--root={small_root}") == 2
    assert "--runtime: it is of the page; --format onnx has none" in capsys.readouterr().err
