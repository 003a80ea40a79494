"""What was learned is kept in a memory: by the commands, in files of other forms and versions, through a kill."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import kill_here
from processes import start, wait
from test_learning import FORMS, assert_same, learning_memory, made, read

from mmrec import MemoryLM
from mmrec.checkpoints.learned import PART
from mmrec.checkpoints.state_file import SavedState, _tensors, load_memory, memory_header, save_memory
from mmrec.core.errors import UserError
from mmrec.inference.reading import Reader


def loaded(model: MemoryLM, name: str) -> SavedState:
    """Return the memory in the file ``name``; the model forgets it again."""
    model.load_memory(name)
    memory, model.memory = model.memory, SavedState.empty(model._trained.net)
    return memory


@pytest.mark.parametrize("form", FORMS)
def test_read_score_generate(
    form: str, mmrec: Command, small_root: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_root / "lightning_logs", "lightning_logs")
    first, second = text[:3000], text[3000:4000]
    for name, part in (("first", first), ("second", second), ("both", first + second)):
        Path(f"{name}.txt").write_text(part)
    assert mmrec("read", "first.txt", "--learn", "--form", form, "--save", "first.mem") == 0
    assert "3,000 tokens read, learned from, " in capsys.readouterr().out
    assert mmrec("read", "second.txt", "--memory", "first.mem", "--save", "parts.mem") == 0
    assert mmrec("read", "both.txt", "--form", form, "--save", "both.mem") == 0
    model = MemoryLM.load("best")
    in_parts, at_once = (loaded(model, name) for name in ("parts.mem", "both.mem"))
    assert_same(in_parts, at_once)
    capsys.readouterr()
    scores = []
    for command in (("both.txt", "--learn", "--form", form), ("both.txt",)):
        assert mmrec("score", *command) == 0
        scores.append(float(capsys.readouterr().out.split()[1]))
    assert model.read(first + second, learn=True, form=form) == pytest.approx(scores[0], abs=1e-4)  # type: ignore[arg-type]
    assert scores[0] != scores[1]
    assert mmrec("generate", "--memory", "first.mem", "--prompt", second, "--length", "30", "--temperature", "0") == 0
    written = capsys.readouterr().out
    assert written == second + model.generate(length=30, temperature=0) + "\n"
    assert_same(model.memory, at_once)
    other = "small" if form == "full" else "full"
    assert mmrec("read", "second.txt", "--memory", "first.mem", "--form", other, "--save", "x.mem") == 2
    assert f"the memory learns in the form {form}, not {other}" in capsys.readouterr().err


def test_generating_is_predicting_on_from_the_memory() -> None:
    """What the fast decoders mix is what reading mixes, in the middle of a part, too."""
    net, tokens = made(), torch.tensor([0, 3, 1, 5, 2] * 72)  # and three more do not end a block of the mixture
    _, memory = read(net, tokens, learning_memory(net))
    assert memory.learned is not None
    assert len(memory.learned.tokens)
    _, decoder = Reader(net, memory).generating(3)
    for token in (0, 3, 1):
        (logits,) = decoder.step([token])
        _, memory = read(net, torch.tensor([token]), memory)
        torch.testing.assert_close(logits.log_softmax(-1), memory.logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_memory_of_version_1_is_read(tmp_path: Path) -> None:
    from mmrec.checkpoints.checksummed import write_checksummed
    from mmrec.checkpoints.state_file import FORMAT

    net, path = made(), tmp_path / "old.mem"
    _, memory = read(net, torch.randint(7, (50,)), SavedState.empty(net))
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(memory).items()}
    write_checksummed(path, replace(FORMAT, version="1"), tensors, {"model": "hash", "position": "50"})
    assert_same(load_memory(path, net, "hash"), memory)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("learned.difference.norm.weight", lambda x: x + 1000, "weights larger than learning ever makes them"),
        ("learned.squares.norm.weight", lambda x: x - 1, "statistics that learning never makes"),
        ("learned.curvature", lambda x: x - 1e6, "statistics that learning never makes"),
        ("learned.tokens", lambda x: x + 7, "tokens that the model does not have"),
        ("learned.tokens", lambda x: x[:1].expand(PART), "tokens that the model does not have"),
        ("learned.tokens", lambda x: x.float(), "does not hold what a memory of this model does"),
        ("learned.mix", lambda x: x * torch.nan, "not finite"),
        ("learned.logits", lambda x: x[:1], "does not hold what a memory of this model does"),
    ],
)
def test_a_memory_that_nothing_has_learned_like_that_is_refused(
    name: str, change: object, message: str, tmp_path: Path
) -> None:
    from mmrec.checkpoints.checksummed import write_checksummed
    from mmrec.checkpoints.state_file import FORMAT

    net, path = made(), tmp_path / "bad.mem"
    _, memory = read(net, torch.randint(7, (PART + 9,)), learning_memory(net))
    assert memory.learned is not None
    tensors = _tensors(memory)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    metadata = {"model": "hash", "position": "9", **memory.learned.metadata()}
    write_checksummed(path, FORMAT, {name: x.contiguous() for name, x in tensors.items()}, metadata)
    with pytest.raises(UserError, match=message):
        load_memory(path, net, "hash")


@pytest.mark.parametrize("part", ["128", "", None])
@pytest.mark.parametrize("kind", ["learned", "counted", "both"])
def test_a_memory_of_parts_of_another_length_is_refused(kind: str, part: str | None, tmp_path: Path) -> None:
    from mmrec.checkpoints.checksummed import read_checksummed, write_checksummed
    from mmrec.checkpoints.state_file import FORMAT

    net, path = made(), tmp_path / "other.mem"
    begun = SavedState.empty(net) if kind == "counted" else learning_memory(net)
    _, memory = read(net, torch.randint(7, (PART + 9,)), begun if kind == "learned" else begun.caching(1))
    save_memory(path, memory, "hash")
    assert memory_header(path).is_current
    tensors, metadata = read_checksummed(path, FORMAT)
    assert metadata["part"] == str(PART)
    del metadata["part"]
    write_checksummed(path, FORMAT, tensors, metadata if part is None else metadata | {"part": part})
    with pytest.raises(UserError, match=f"was not made in parts of {PART} tokens, as .*; read the text again$"):
        load_memory(path, net, "hash")
    assert not memory_header(path).is_current
    save_memory(path, memory, "hash")  # in its place
    assert_same(load_memory(path, net, "hash"), memory)


def die_at(name: str, after: bool) -> None:
    """Have this process killed at its first call of ``os.NAME``, before or after the call itself."""
    real = getattr(os, name)

    def deadly(*arguments: object) -> None:
        if after:
            real(*arguments)
        kill_here()

    setattr(os, name, deadly)


@pytest.mark.parametrize(("name", "after"), [("fsync", False), ("replace", False), ("replace", True)])
def test_a_kill_leaves_the_memory_before_or_the_one_after(
    name: str, after: bool, mmrec: Command, small_root: Path, text: str, tmp_path: Path
) -> None:
    shutil.copytree(small_root / "lightning_logs", "lightning_logs")
    for part, some in (("first", text[:600]), ("second", text[600:900])):
        Path(f"{part}.txt").write_text(some)
    assert mmrec("read", "first.txt", "--learn", "--save", "book.mem") == 0
    assert mmrec("read", "second.txt", "--memory", "book.mem", "--save", "expected.mem") == 0
    model = MemoryLM.load("best")
    before, expected = loaded(model, "book.mem"), loaded(model, "expected.mem")
    command = ["read", "second.txt", "--memory", "book.mem", "--save", "book.mem"]
    assert wait([start(tmp_path, command, die_at, name, after)]) == -signal.SIGKILL
    assert_same(loaded(model, "book.mem"), expected if after else before)
    if not after:
        assert mmrec(*command) == 0
        assert_same(loaded(model, "book.mem"), expected)
