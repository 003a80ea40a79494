"""A model in other programs: the same tokens, logits and text, and its memories fit."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import checkpoints
from models import TEXT, TOKENIZERS, made
from safetensors import SafetensorError

from mmrec import MemoryLM as API
from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY, describe_model
from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.checkpoints.state_file import model_hash
from mmrec.checkpoints.weights import save_weights
from mmrec.core.errors import UserError
from mmrec.export.tokenizer import fast_tokenizer
from mmrec.model import ModelConfig
from mmrec.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture
def run(mmrec: Command, text: str) -> LoadedModel:
    """A run in the folder of the test, as a training leaves it."""
    trained = made(CharacterTokenizer(text))
    weights = {f"net.{name}": weight for name, weight in trained.net.state_dict().items()}
    checkpoint = {MODEL_KEY: describe_model(trained.net, trained.tokenizer), "state_dict": weights, "global_step": 5}
    write_checkpoint(checkpoint, checkpoints("a") / "best.ckpt")
    Path("text.txt").write_text(text, encoding="utf-8")
    return trained


def texts() -> list[str]:
    choose = random.Random(0)
    return [TEXT, "", *("".join(choose.choices(TEXT, k=60)) for _ in range(100))]


def test_the_fast_tokenizer_gives_the_same_tokens_and_the_text_back(tokenizer: Tokenizer) -> None:
    fast = fast_tokenizer(tokenizer)
    assert fast.get_vocab_size() == tokenizer.vocab_size
    for text in texts():
        ids = fast.encode(text).ids
        assert ids == tokenizer.encode(text).tolist()
        assert fast.decode(ids) == text
    whole = [token for token in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([token])]
    assert [fast.decode([token]) for token in whole] == [tokenizer.decode([token]) for token in whole]


def test_a_character_without_a_token_is_refused() -> None:
    with pytest.raises(Exception, match="WordLevel"):
        fast_tokenizer(CharacterTokenizer("abc")).encode("abcd")


# One file


def test_one_file_is_the_model_and_its_memories_fit(mmrec: Command, run: LoadedModel) -> None:
    assert mmrec("read", "text.txt", "--save", "book.mem") == 0
    assert mmrec("export", "--format", "safetensors", "--output_dir", "out") == 0
    one = API.load("out/model.safetensors")
    one.load_memory("book.mem")
    other = API.load("best")
    other.load_memory("book.mem")
    assert one.generate("to be", length=50) == other.generate("to be", length=50)


def test_a_learned_memory_is_exported_as_a_model_of_its_own(
    mmrec: Command, run: LoadedModel, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("read", "text.txt", "--learn", "--save", "book.mem") == 0
    assert mmrec("export", "--format", "safetensors", "--memory", "book.mem", "--output_dir", "out") == 0
    back, learned = load_model(Path("out/model.safetensors")), API.load("best")
    learned.load_memory("book.mem")
    assert learned.memory.learned is not None
    for name, weight in back.net.named_parameters():
        expected = run.net.get_parameter(name) + learned.memory.learned.difference[name]
        assert torch.equal(weight, expected)
    assert API.load("out/model.safetensors").read(text[:2000]) < API.load("best").read(text[:2000])
    with pytest.raises(UserError, match="the memory of another model"):
        API.load("out/model.safetensors").load_memory("book.mem")
    # A later run, whose best checkpoint is damaged, is not that of the memory.
    later = Path("lightning_logs/later/checkpoints")
    later.mkdir(parents=True)
    (later / "best.ckpt").write_bytes(b"cut")
    assert mmrec("export", "--format", "safetensors", "--memory", "book.mem", "--output_dir", "again") == 0
    again = load_model(Path("again/model.safetensors")).net
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in back.net.named_parameters())
    shutil.rmtree("lightning_logs/later")
    assert mmrec("read", "text.txt", "--save", "plain.mem") == 0
    assert mmrec("export", "--format", "hf", "--memory", "plain.mem", "--output_dir", "hf") == 2
    assert "plain.mem: holds nothing that was learned; read the text with --learn" in capsys.readouterr().err
    assert not Path("hf").exists()


def test_generate_takes_the_file(mmrec: Command, run: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("export", "--format=safetensors", "--output_dir=out") == 0
    written = []
    for ckpt in ("best", "out/model.safetensors"):
        capsys.readouterr()
        assert mmrec("generate", "--ckpt", ckpt, "--prompt", "to be", "--length", "50") == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


@pytest.mark.parametrize("tied", [True, False])
def test_one_file_keeps_hash_step_and_ties(tokenizer: Tokenizer, tied: bool, tmp_path: Path) -> None:
    trained = made(tokenizer, ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, tie_embeddings=tied))
    save_weights(tmp_path / "model.safetensors", trained.net, tokenizer, trained.step)
    back = load_model(tmp_path / "model.safetensors")
    assert model_hash(back.net, back.tokenizer) == model_hash(trained.net, tokenizer)
    assert back.step == trained.step
    assert (back.net.head.weight is back.net.embedding.weight) == tied


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path, choose = tmp_path / "model.safetensors", random.Random(0)
    trained = made(ByteTokenizer())
    save_weights(path, trained.net, trained.tokenizer, 1)
    whole = path.read_bytes()
    for number in range(60):
        data = bytearray(whole)
        place = choose.randrange(2000 if number % 3 else len(data))  # the head is where most can go wrong
        if number % 2:
            data[place] ^= 1 << choose.randrange(8)
        else:
            del data[place:]
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"model\.safetensors: "):
            load_model(path)


# The command


def test_an_export_is_replaced_only_if_asked_for(
    mmrec: Command, run: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", "--format=safetensors", "--output_dir=out")
    assert mmrec(*command) == 0
    Path("out/model.safetensors").write_bytes(b"damaged")
    assert mmrec(*command) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("out/model.safetensors").read_bytes() == b"damaged"
    assert mmrec(*command, "--force") == 0
    assert load_model(Path("out/model.safetensors")).step == run.step
    Path("out/mine.txt").write_text("dear", encoding="utf-8")
    assert mmrec(*command, "--force") == 2
    assert "holds something else (mine.txt)" in capsys.readouterr().err
    assert Path("out/mine.txt").read_text(encoding="utf-8") == "dear"


def test_nothing_is_left_of_an_export_that_fails(
    mmrec: Command, run: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: str, folder: Path, *others: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmrec.export.command._write", full)
    before = set(Path().iterdir())
    assert mmrec("export", "--format=hf", "--output_dir=out") == 2
    assert capsys.readouterr().err == "mmrec: error: out: cannot be written: No space left on device\n"
    assert set(Path().iterdir()) == before


def test_a_full_disk_is_said_in_one_line(
    mmrec: Command, run: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("mmrec.export.hf.save", full)
    assert mmrec("export", "--format=hf", "--output_dir=out") == 2
    says = "the export cannot be written: I/O error: No space left on device"
    assert capsys.readouterr().err == f"mmrec: error: {says}\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=hf"], "output_dir"),
        (["--output_dir=out"], "format"),
        (["--format=gguf", "--output_dir=out"], "gguf"),
        (["--format=hf", "--output_dir=out", "--run=b"], "no checkpoint of a run 'b'"),
        (["--format=hf", "--output_dir=text.txt"], "is not a folder"),
        (["--format=hf", "--output_dir=out", "--ckpt=foreign.safetensors"], "is not a model file of mmrec"),
        (["--format=hf", "--output_dir=out", "--ckpt=text.safetensors"], "is not a readable model file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    mmrec: Command, run: LoadedModel, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, "foreign.safetensors", {"format": "pt"})
    Path("text.safetensors").write_text("a text", encoding="utf-8")
    capsys.readouterr()
    assert mmrec("export", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("format", ["hf", "onnx"])
def test_what_is_not_installed_is_named(
    mmrec: Command, run: LoadedModel, format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"mmrec.export.{format}", None)
    assert mmrec("export", f"--format={format}", "--output_dir=out") == 2
    assert "pip install 'mmrec[export]'" in capsys.readouterr().err
    assert not Path("out").exists()
