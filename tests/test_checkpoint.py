"""Checkpoints: whole or absent, and nothing in them is ever run."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from mmrec import runs
from mmrec.checkpoint import KEY, VERSION, check_same, describe, load_trained, read_checkpoint, write_checkpoint
from mmrec.errors import UserError
from mmrec.model import MemoryLM, Shape
from mmrec.tokenizers import CharacterTokenizer, Tokenizer

SHAPE = Shape(dim=16, layers=2, memories=("short", "long"), heads=2, ffn_dim=24)
TOKENIZER = CharacterTokenizer("abc")


def content(net: MemoryLM, tokenizer: Tokenizer = TOKENIZER) -> dict:
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {KEY: describe(net, tokenizer), "state_dict": weights, "global_step": 7}


def test_a_checkpoint_is_all_that_a_model_needs(tmp_path: Path) -> None:
    net = MemoryLM(SHAPE, 3).eval()
    write_checkpoint(content(net), tmp_path / "deep" / "a.ckpt")
    trained = load_trained(tmp_path / "deep" / "a.ckpt")
    assert (trained.step, trained.tokenizer.digest()) == (7, TOKENIZER.digest())
    tokens = torch.tensor([[0, 1, 2, 1]])
    assert torch.equal(trained.net(tokens, net.zero_state(1))[0], net(tokens, net.zero_state(1))[0])


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(content(MemoryLM(SHAPE, 3)), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(UserError, match=r"a\.ckpt: cannot save the checkpoint: No space left"):
            write_checkpoint(content(MemoryLM(SHAPE, 3)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save the checkpoint"):
        write_checkpoint({}, tmp_path / "file" / "a.ckpt")


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({KEY: Malicious()}, "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_checkpoint(Path(name))
    assert not Path("pwned").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint = content(MemoryLM(SHAPE, 3))
    checkpoint[KEY]["version"] = VERSION + 1
    write_checkpoint(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"version {VERSION + 1}"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_what_differs_is_named() -> None:
    checkpoint = content(MemoryLM(SHAPE, 3))
    check_same(checkpoint, MemoryLM(SHAPE, 3), TOKENIZER)
    other = Shape(dim=16, layers=2, memories=("long",), heads=2, ffn_dim=24)
    with pytest.raises(UserError, match="memories"):
        check_same(checkpoint, MemoryLM(other, 3), TOKENIZER)
    with pytest.raises(UserError, match="another tokenizer"):
        check_same(checkpoint, MemoryLM(SHAPE, 3), CharacterTokenizer("abd"))


def test_runs_are_found_by_name_and_by_age(tmp_path: Path) -> None:
    assert runs.new_run(tmp_path) == "version_0"
    for age, name in enumerate(("version_0", "mine", "version_3")):
        folder = runs.checkpoint_folder(tmp_path, name)
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
        os.utime(folder / "last.ckpt", (1000 - age, 1000 - age))
    assert runs.new_run(tmp_path) == "version_4"
    assert runs.find_run(tmp_path, None) == "version_0"
    assert runs.find_checkpoint(tmp_path, "mine", "last").parent.parent.name == "mine"
    assert runs.find_checkpoint(tmp_path, None, str(tmp_path / "lightning_logs" / "mine")).name == "last.ckpt"
    with pytest.raises(UserError, match=r"no best\.ckpt"):
        runs.find_checkpoint(tmp_path, None, "best")
    with pytest.raises(UserError, match="did you mean 'mine'"):
        runs.find_run(tmp_path, "mien")
