"""A model of portable layers as GGUF: the file says what the model is, and llama.cpp computes what we compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from gguf import GGUFReader
from gguf.quants import dequantize
from models import TEXT, TOKENIZERS, made

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.export import gguf
from mmrec.inference.generate import generate_tokens
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig
from mmrec.tokenizers import BPETokenizer, ByteTokenizer, CharacterTokenizer, Tokenizer

CONFIG = ModelConfig(dim=32, layers=2, layer_types=("portable",), heads=2, ffn_dim=48)
ENGLISH = "It was the best of times, it was the worst of times \\ \t 'twas\r\n\n  and 1775 ended.\n"
TOKENIZERS_THERE = {name: make for name, make in TOKENIZERS.items() if name != "characters"} | {
    "characters": lambda: CharacterTokenizer(ENGLISH)
}
READ_THERE = """
import json, sys
import numpy as np
from llama_cpp import Llama
asked = json.loads(sys.stdin.read())
llm = Llama(asked["path"], n_ctx=2048, logits_all=True, n_threads=1, verbose=False)
tokens = llm.tokenize(asked["text"].encode(), add_bos=False)
llm.eval(tokens)
logits = llm.scores[: len(tokens)].tolist()
llm.reset()
for token in tokens:  # the other path of llama.cpp: token by token
    llm.eval([token])
singly = llm.scores[: len(tokens)].tolist()
llm.reset()
written = []
for token in llm.generate(tokens, temp=0, top_k=1, repeat_penalty=1.0):
    written.append(token)
    if len(written) == asked["length"]:
        break
print(json.dumps({
    "tokens": tokens, "logits": logits, "singly": singly, "written": written, "back": llm.detokenize(tokens).decode(),
    "eos": llm.token_eos(),
}))
"""


def read_there(path: Path, text: str, length: int) -> dict[str, Any]:
    """Read ``text`` and write ``length`` tokens in llama.cpp, in a process of its own: its asserts end it."""
    asked = json.dumps({"path": str(path), "text": text, "length": length})
    done = subprocess.run(
        [sys.executable, "-c", READ_THERE], input=asked, capture_output=True, text=True, check=True, env=os.environ
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS_THERE)
def test_llama_cpp_gives_our_tokens_logits_and_text(name: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = TOKENIZERS_THERE[name]()
    trained = made(tokenizer, CONFIG)
    gguf.save(tmp_path, trained)
    text = ENGLISH if name == "characters" else TEXT.replace("\0", "")
    length = 500 if name == "bytes" else 20
    found = read_there(tmp_path / "model.gguf", text, length)
    ids = tokenizer.encode(text).tolist()
    assert found["tokens"] == ids
    assert found["back"] == text
    tokens = torch.tensor(ids)
    with torch.no_grad():
        expected, _ = trained.net(tokens[None], trained.net.zero_state(1))
    for logits in (found["logits"], found["singly"]):
        torch.testing.assert_close(torch.tensor(logits), expected[0], atol=1e-3, rtol=0)
    written = generate_tokens(trained.net, tokens, SamplingOptions(length, temperature=0))
    assert found["written"] == list(written)
    if tokenizer.separator is not None:
        assert found["eos"] == tokenizer.separator


@llama_cpp
def test_llama_cpp_refuses_a_character_without_a_token(tmp_path: Path) -> None:
    gguf.save(tmp_path, made(CharacterTokenizer(ENGLISH), CONFIG))
    with pytest.raises(subprocess.CalledProcessError) as raised:
        read_there(tmp_path / "model.gguf", "It was ß", 1)
    assert "RuntimeError: llama_decode returned -1" in raised.value.stderr


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def test_the_file_has_the_weights_and_the_config(tmp_path: Path) -> None:
    trained = made(ByteTokenizer(), CONFIG)
    gguf.save(tmp_path, trained)
    reader = GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if name.startswith("qwen35.")}
    assert said["qwen35.attention.recurrent_layers"] == [True, True, False]
    assert said["qwen35.full_attention_interval"] == said["qwen35.block_count"] == 3
    assert (said["qwen35.ssm.state_size"], said["qwen35.ssm.inner_size"]) == (16, 32)
    there = tensors(tmp_path / "model.gguf")
    project = trained.net.blocks[1].get_parameter("memory.project.weight").detach().numpy()
    assert np.array_equal(there["blk.1.attn_qkv.weight"], project[:96])
    assert np.array_equal(there["blk.1.attn_gate.weight"], project[100:])
    assert not any(there[name].any() for name in there if name.startswith("blk.2."))
    count = sum(values.size for name, values in there.items() if not name.startswith("blk.2."))
    assert count == trained.net.parameter_count()


@pytest.mark.parametrize(("weights", "share", "error"), [("f16", 0.5, 5e-4), ("q8_0", 0.27, 5e-3)])
def test_fewer_bits_are_a_smaller_file_and_the_same_weights_nearly(
    weights: str, share: float, error: float, tmp_path: Path
) -> None:
    trained = made(ByteTokenizer(), ModelConfig(dim=64, layers=4, layer_types=("portable",), heads=1, ffn_dim=128))
    (tmp_path / "whole").mkdir()
    gguf.save(tmp_path / "whole", trained)
    gguf.save(tmp_path, trained, weights)
    whole, small = tmp_path / "whole" / "model.gguf", tmp_path / "model.gguf"
    assert small.stat().st_size < (share + 0.1) * whole.stat().st_size
    expected, found = tensors(whole), tensors(small)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= error * max(np.abs(values).max(), 1e-9)
        if values.ndim == 1 or "conv1d" in name:
            assert np.array_equal(found[name], values)


def test_rows_that_q8_0_cannot_block_are_float16(tmp_path: Path) -> None:
    gguf.save(tmp_path, made(ByteTokenizer(), CONFIG), "q8_0")  # the feed-forward network has an inner width of 48
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize(
    ("config", "tokenizer", "says"),
    [
        (ModelConfig(dim=16, layers=2, heads=2), ByteTokenizer(), "short layers, which GGUF has no form for"),
        (
            ModelConfig(dim=16, layers=1, layer_types=("portable",), heads=2, negative_eigenvalues=True),
            ByteTokenizer(),
            "negative_eigenvalues",
        ),
        (
            ModelConfig(dim=16, layers=1, layer_types=("portable",), heads=2, count_half_lives=(20,)),
            ByteTokenizer(),
            "count_half_lives",
        ),
        (
            ModelConfig(dim=16, layers=1, layer_types=("portable",), heads=2, conv_width=1),
            ByteTokenizer(),
            "conv_width",
        ),
        (CONFIG, CharacterTokenizer("aé"), "alphabet has 'é'"),
    ],
)
def test_what_gguf_cannot_express_is_refused(
    config: ModelConfig, tokenizer: Tokenizer, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        gguf.save(tmp_path, made(tokenizer, config))


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path: Path) -> None:
    described = json.loads(BPETokenizer.train("the end " * 9, 258).state()["model"])
    described["pre_tokenizer"]["use_regex"] = False
    with pytest.raises(UserError, match="does not cut a text as GPT-2's does"):
        gguf.save(tmp_path, made(BPETokenizer(json.dumps(described)), CONFIG))


def test_the_command_writes_it(mmrec: Command, portable_run: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("export", "--format", "gguf", "--weights", "q8_0", "--output_dir", "out") == 0
    assert "model.gguf" in capsys.readouterr().out
    assert mmrec("export", "--format", "gguf", "--weights", "f16", "--output_dir", "out") == 2
    assert "already holds an export" in capsys.readouterr().err
    assert mmrec("export", "--format", "hf", "--weights", "f16", "--output_dir", "hf") == 2
    assert "--weights f16: --format hf takes f32" in capsys.readouterr().err


@pytest.fixture
def portable_run(mmrec: Command) -> LoadedModel:
    from helpers import checkpoints
    from models import content

    from mmrec.checkpoints.checkpoint import write_checkpoint

    trained = made(ByteTokenizer(), CONFIG)
    write_checkpoint(content(trained.net, trained.tokenizer), checkpoints("a") / "best.ckpt")
    return trained
