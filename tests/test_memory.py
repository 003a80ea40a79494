"""A text is read once; what was read is kept, gone on from, and refused to another model."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shlex
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Command
from helpers import fit

from mmrec import MemoryLM
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.state_file import SavedState, load_memory, model_hash, save_memory
from mmrec.core.errors import UserError
from mmrec.inference.reading import iter_nll
from mmrec.inference.text_input import iter_pieces
from mmrec.model import ModelConfig
from mmrec.model import RecurrentLM as Net
from mmrec.tokenizers import BPETokenizer, ByteTokenizer

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)


@pytest.fixture
def trained(mmrec: Command, small_root: Path) -> str:
    shutil.copytree(small_root / "lightning_logs", "lightning_logs")
    return "a"


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(SHAPE, 256).eval()


def test_a_memory_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = net()
    tokens = np.frombuffer(b"something that is read " * 300, dtype=np.uint8)
    *_, (_, memory) = iter_nll(model, tokens, SavedState.empty(model))
    save_memory(tmp_path / "a.mem", memory, "hash")
    back = load_memory(tmp_path / "a.mem", model, "hash")
    assert back.position == memory.position == len(tokens)
    assert torch.equal(back.logits, memory.logits)
    for mine, theirs in zip(back.state, memory.state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert (tmp_path / "a.mem").stat().st_size < 20_000


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "a.mem"
    *_, (_, memory) = iter_nll(model, np.arange(50) % 7, SavedState.empty(model))
    save_memory(path, memory, "hash")
    whole, choose = path.read_bytes(), random.Random(0)
    for number in range(200):
        data = bytearray(whole)
        if number % 2:
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        else:
            del data[choose.randrange(len(data)) :]
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.mem: "):
            load_memory(path, model, "hash")


def test_the_hash_tells_models_apart() -> None:
    hashes = {model_hash(net(0), ByteTokenizer()), model_hash(net(1), ByteTokenizer())}
    hashes.add(model_hash(net(0), ByteTokenizer(documents=True)))
    assert len(hashes) == 3
    assert model_hash(net(0), ByteTokenizer()) in hashes


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
@pytest.mark.parametrize("ends", ["\n", "\r\n", " "])
def test_pieces_have_the_tokens_of_the_whole(size: int, ends: str) -> None:
    text = "To be, or\n\n not to be:\r\n\tthat\nis  \n \n the question.\nWhether 'tis\n" * 20
    text = text.replace("\r", "").replace("\n", ends) if ends != "\n" else text
    tokenizer = BPETokenizer.train(text, 300)
    parts = list(iter_pieces(io.StringIO(text, newline=""), size))
    assert "".join(parts) == text
    assert np.concatenate([tokenizer.encode(part) for part in parts]).tolist() == tokenizer.encode(text).tolist()
    assert size > 1000 or len(parts) > 5


def test_costs_are_those_of_one_pass() -> None:
    model = net()
    tokens = torch.randint(256, (5000,))
    logits, _ = model(tokens[None], model.zero_state(1))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    memory, found = SavedState.empty(model), []
    for part in tokens.numpy().astype(np.uint16)[:3000], tokens.numpy().astype(np.uint16)[3000:]:
        for nats, after in iter_nll(model, part, memory):
            found.append(nats)
            memory = after
    torch.testing.assert_close(torch.cat(found)[1:], expected, rtol=1e-4, atol=1e-4)
    assert float(found[0][0]) == 0
    assert memory.position == 5000


def test_read_then_write(mmrec: Command, trained: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading a book in parts and going on is the same as the whole as the prompt."""
    first, second = text[:4000], text[4000:6000]
    Path("first.txt").write_text(first)
    Path("second.txt").write_text(second)
    assert mmrec("read", "first.txt", "--save", "first.mem") == 0
    assert "first.mem: 4,000 tokens read" in capsys.readouterr().out
    assert mmrec("read", "second.txt", "--memory", "first.mem", "--save", "both.mem") == 0
    assert "6,000 tokens read" in capsys.readouterr().out
    assert mmrec("generate", "--memory", "both.mem", "--length", "40", "--temperature", "0") == 0
    gone_on = capsys.readouterr().out
    assert mmrec("generate", "--prompt", first + second, "--length", "40", "--temperature", "0") == 0
    assert capsys.readouterr().out == first + second + gone_on
    assert mmrec("generate", "--memory", "first.mem", "--prompt", second, "--length", "40", "--temperature", "0") == 0
    assert capsys.readouterr().out == second + gone_on


@pytest.mark.parametrize(
    ("command", "says"),
    [("read --save", "holds something else than a memory"), ("score --token_nll", "such a table")],
)
def test_a_file_of_a_person_is_never_replaced(
    command: str, says: str, mmrec: Command, trained: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("book.txt").write_text(text)
    name, option = command.split()
    assert mmrec(name, "book.txt", option, "book.txt") == 2
    assert says in capsys.readouterr().err
    assert Path("book.txt").read_text() == text
    Path("empty").touch()
    for target in ("out", "out", "empty", "/dev/null"):  # its own, or nobody's
        assert mmrec(name, "book.txt", option, target) == 0


def test_score(
    mmrec: Command, trained: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("all.txt").write_text(text[:6000])
    Path("end.txt").write_text(text[4000:6000])
    Path("start.txt").write_text(text[:4000])
    assert mmrec("score", "all.txt", "--token_nll", "all.tsv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("all.txt: ")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"  from token {n}" for n in ("0", "1,024", "2,048", "4,096")
    ]
    rows = [row.split("\t") for row in Path("all.tsv").read_text().splitlines()[1:]]
    assert len(rows) == 6000
    costs = [float(row[2]) for row in rows]
    assert float(lines[0].split()[1]) == pytest.approx(sum(costs) / 5999, abs=1e-3)
    assert mmrec("read", "start.txt", "--save", "start.mem") == 0
    capsys.readouterr()
    assert mmrec("score", "end.txt", "--memory", "start.mem") == 0
    end = capsys.readouterr().out.splitlines()
    assert float(end[0].split()[1]) == pytest.approx(sum(costs[4000:]) / 2000, abs=1e-3)
    assert end[1].startswith("  from token 4,000: ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text[:6000].encode())))
    assert mmrec("score", "-") == 0
    assert capsys.readouterr().out.splitlines()[0].removeprefix("-") == lines[0].removeprefix("all.txt")


@pytest.mark.parametrize(
    ("text", "options", "word"),
    [
        ("the the", {"form": "tiny"}, "the form is 'tiny'; it must be one of full, small"),
        ("the \ud800", {}, "half a surrogate pair"),
        (
            "the \u6625 the",
            {"learn": True},
            "the character '\u6625' (in 'the \u6625",
        ),
    ],
)
def test_a_text_that_cannot_be_read_leaves_the_memory_as_it_was(
    trained: str, text: str, options: dict[str, Any], word: str
) -> None:
    model = MemoryLM.load("best")
    model.read("the ")
    before = model.memory
    with pytest.raises(UserError, match=re.escape(word)):
        model.read(text, **options)
    assert model.memory is before


def test_the_api(trained: str, text: str, tmp_path: Path) -> None:
    model = MemoryLM.load("best")
    cost = model.read(text[:3000])
    assert 0 < cost < 4
    written = model.generate(length=30, temperature=0)
    assert written == model.generate(length=30, temperature=0)  # writing leaves the memory as it is
    assert len(written) == 30
    model.save_memory(tmp_path / "x.mem")
    other = MemoryLM.load("best")
    other.load_memory(tmp_path / "x.mem")
    assert other.memory.position == 3000
    assert other.generate(length=30, temperature=0) == written
    other.memory = SavedState.empty(other._trained.net)
    assert "".join(other.stream(text[:3000], 30, temperature=0)) == written
    for wrong in (
        {"top_p": 0},
        {"top_k": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"length": -1},
        {"seed": 1 << 64},
    ):
        (name,) = wrong
        with pytest.raises(UserError, match=f"^{name} is "):
            model.generate(**wrong)
    with pytest.raises(
        TypeError, match=r"the text is of type PosixPath; give a str, as Path\(\.\.\.\)\.read_text\(\)"
    ):
        model.read(tmp_path / "x.mem")  # type: ignore[arg-type]


def test_a_byte_order_mark_is_not_read(mmrec: Command, trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As some editors write one: the alphabet of a prepared text has none either."""
    Path("marked.txt").write_text("to be", encoding="utf-8-sig")
    assert mmrec("read", "marked.txt", "--save", "x.mem") == 0
    assert "5 tokens read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["read", "nothing.txt", "--save", "x.mem"], "nothing.txt: cannot be read: No such file or directory"),
        (["read", "empty.txt", "--save", "x.mem"], "empty.txt: is empty"),
        (["read", "latin.txt", "--save", "x.mem"], "latin.txt: is not UTF-8 text"),
        (["read", "one.txt", "--save", "no/x.mem"], "no/x.mem: cannot be written"),
        (["read", "greek.txt", "--save", "no/x.mem"], "no/x.mem: cannot be written: there is no folder no"),
        (["read", "greek.txt", "--save", "x.mem"], "is not in the alphabet"),
        (["score", "one.txt"], "a single token, which nothing predicts"),
        (["generate", "--memory", "nothing.mem"], "nothing.mem: no such file"),
        (["generate", "--memory", "."], ".: is no file"),
        (["generate", "--memory", "one.txt"], "one.txt: is not a readable memory"),
        (["generate", "--memory", "other.mem"], "other.mem: is the memory of another model than lightning_logs/"),
        (["generate", "--prompt", ""], "--prompt is ''; it must not be empty"),
    ],
)
def test_bad_requests(
    mmrec: Command, trained: str, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("t")
    Path("greek.txt").write_text("αβγ")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    model = net()
    save_memory(Path("other.mem"), SavedState.empty(model), "another hash")
    assert mmrec(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("x.mem").exists()


def test_a_memory_is_read_on_by_its_own_model_where_another_was_trained_since(
    mmrec: Command, trained: str, prepared: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("start.txt").write_text(text[:300], encoding="utf-8")
    assert mmrec("read", "start.txt", "--save", "start.mem") == 0
    asked = ["generate", "--memory", "start.mem", "--length", "20", "--temperature", "0"]
    assert mmrec(*asked) == 0
    written = capsys.readouterr().out.splitlines()[1:]
    assert mmrec(*fit(prepared, "--run=since", "--seed_everything=1", "--trainer.max_steps=2")) == 0
    capsys.readouterr()
    assert mmrec(*asked) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == written
    assert err.count("start.mem: is the memory of lightning_logs/") == 1
    assert "since" not in err
    assert mmrec(*asked, "--run=since") == 2
    assert "another model than lightning_logs/since/" in capsys.readouterr().err
    Path("lightning_logs/since/checkpoints/best.ckpt").unlink()  # as of a run that was stopped early
    assert mmrec(*asked) == 0
    assert capsys.readouterr().out.splitlines() == written
    shutil.rmtree("lightning_logs/a")
    assert mmrec(*fit(prepared, "--run=third", "--trainer.max_steps=1")) == 0
    capsys.readouterr()
    assert mmrec(*asked) == 2
    assert (
        "none of the best checkpoints of the 2 runs in lightning_logs; name its model by" in capsys.readouterr().err
    )


def test_the_hash_is_the_same_on_every_machine() -> None:
    """Of fixed numbers, so that nothing but the format decides: neither byte order nor the layout in memory."""
    model = net()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).view(weight.shape) / 64 + number)
    expected = hashlib.sha256()
    expected.update(json.dumps([SHAPE.as_dict(), ByteTokenizer().digest()], sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        expected.update(name.encode() + struct.pack(f"<{weight.numel()}f", *weight.flatten().tolist()))
    assert model_hash(model, ByteTokenizer()) == expected.hexdigest()
    model.blocks[0].get_submodule("ffn").project.weight.data = (  # type: ignore[union-attr]
        model.blocks[0].get_parameter("ffn.project.weight").data.T.contiguous().T
    )
    assert model_hash(model, ByteTokenizer()) == expected.hexdigest()


def test_the_documentation_s_python_runs(trained: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Typed from docs/memory.md as it stands there."""
    Path("BOOK.txt").write_text(text[:3000])
    guide = (REPOSITORY / "docs" / "memory.md").read_text(encoding="utf-8").replace('"And then"', '"that is"')
    examples = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "docs/memory.md", "exec"), {})
    assert capsys.readouterr().out
    loaded = load_model(Path("lightning_logs/a/checkpoints/best.ckpt"))
    kept = load_memory(Path("book.mem"), loaded.net, model_hash(loaded.net, loaded.tokenizer))
    assert kept.position >= 3000


def test_the_documentation_s_commands_run(mmrec: Command, trained: str, text: str) -> None:
    for name, part in (("BOOK", text[:3000]), ("MORE", text[3000:5000]), ("NEXT", text[5000:7000])):
        Path(f"{name}.txt").write_text(part)
    guide = (REPOSITORY / "docs" / "memory.md").read_text(encoding="utf-8").replace('"And then"', '"that is"')
    commands = [line for line in guide.splitlines() if line.startswith("mmrec ")]
    assert len(commands) >= 5
    for command in commands:
        assert mmrec(*shlex.split(command, comments=True)[1:]) == 0, command
    assert {"book.mem", "both.mem", "next.tsv"} <= {path.name for path in Path().iterdir()}
