"""``mmrec eval context``: every text is scored at the same places, with as much read before as is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import checkpoints

from mmrec.checkpoints.loading import LoadedModel
from mmrec.evals.context import ContextOptions, context_nll
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import CharacterTokenizer

CONFIG = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=16)


@pytest.mark.parametrize("before", [1, 3, 8, 50])
def test_each_token_has_so_many_before_it(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain model, which reads each token's own past in one go; rows end inside and beyond the text."""
    monkeypatch.setattr("mmrec.evals.context.CHUNK", 7)
    monkeypatch.setattr("mmrec.evals.context.ROWS", 4)
    net = RecurrentLM(CONFIG, 11).eval()
    text = np.random.default_rng(0).integers(11, size=124).astype(np.uint16)
    first, count = 51, 73
    found = context_nll(net, text, first, count, before)
    assert found.shape == (count,)
    for place, nll in enumerate(found):
        begin = first - before + place // before * before
        read = torch.from_numpy(text[begin : first + place + 1].astype(np.int64))[None]
        assert before <= read.shape[1] - 1 < 2 * before
        with torch.no_grad():
            logits, _ = net(read[:, :-1], net.zero_state(1))
        expected = torch.nn.functional.cross_entropy(logits[0, -1:], read[0, -1:])
        assert nll == pytest.approx(float(expected), abs=1e-5)


def test_a_model_without_a_memory_gains_nothing(tmp_path: Path) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("abc"), size=3000))
    (tmp_path / "book.txt").write_text(letters)
    tokenizer = CharacterTokenizer("abc")
    net = RecurrentLM(replace(CONFIG, layer_types=("short",), conv_width=1), tokenizer.vocab_size).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.get_parameter("memory.output.weight").zero_()
    file = str(tmp_path / "book.txt")
    found = ContextOptions(files=[file], before=[700, 16], scored=2000).losses(LoadedModel(net, tokenizer, 0), file)
    assert (found["tokens"], found["characters"], found["before"]) == (2000, 2000, [16, 700])
    np.testing.assert_allclose(found["losses"], found["losses"][:1] * 2, rtol=1e-6)
    np.testing.assert_allclose(found["gains"] + found["errors"], 0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing")
def test_books_are_scored_by_a_checkpoint(
    mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoints("a", small_root) / "last.ckpt"
    for name, line in (("one", "1: to be or not to be that is the question\n"), ("two", "2: so be it\n")):
        Path(f"{name}.txt").write_text(line * 120)
    options = [f"--ckpt={checkpoint}", "--files=[one.txt,two.txt]"]
    assert mmrec("eval", "context", *options, "--before=[600,1,8]", "--scored=700") == 0
    shown = capsys.readouterr().out
    assert "all 2" in shown
    assert "below 600 to 1,200" in shown
    assert Path("eval/context.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(Path("eval/context.json").read_text())
    assert result["before"] == [1, 8, 600]
    for found in result["texts"].values():
        assert found["characters"] == found["tokens"] == 700
        assert found["gains"][2] == 0
        assert found["gains"] == pytest.approx([found["losses"][2] - loss for loss in found["losses"]])
        assert found["losses"][1] < found["losses"][0]
    for arguments, says in [
        (options[:1], "give --files"),
        ([*options, "--before=[0]"], "numbers of at least 1"),
        ([*options, "--scored=0"], "at least 1"),
        ([*options, "--before=[1000]"], "two.txt: 440 tokens would be scored, fewer than 512"),
        ([*options, "--before=[9999]"], "one.txt: 0 tokens would be scored"),
        ([options[0], "--files=[nowhere.txt]"], "nowhere.txt: cannot be read"),
    ]:
        assert mmrec("eval", "context", *arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
