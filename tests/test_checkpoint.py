"""Checkpoints: whole or absent, and nothing in them is ever run."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Figure
from models import SHORT_AND_LONG, TOKENIZER, content

from mmrec.checkpoints import runs
from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint, write_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY, PROGRESS_KEY, check_compatible
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.migrations import VERSION
from mmrec.core.errors import UserError
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import CharacterTokenizer


def test_a_checkpoint_is_all_that_a_model_needs(tmp_path: Path) -> None:
    net = RecurrentLM(SHORT_AND_LONG, 3).eval()
    write_checkpoint(content(net), tmp_path / "deep" / "a.ckpt")
    trained = load_model(tmp_path / "deep" / "a.ckpt")
    assert (trained.step, trained.tokenizer.digest()) == (7, TOKENIZER.digest())
    tokens = torch.tensor([[0, 1, 2, 1]])
    assert torch.equal(trained.net(tokens, net.zero_state(1))[0], net(tokens, net.zero_state(1))[0])


def test_negative_eigenvalues_are_kept_and_a_config_of_before_has_none(tmp_path: Path) -> None:
    for negative in (False, True):
        config = replace(SHORT_AND_LONG, negative_eigenvalues=negative)
        assert ("negative_eigenvalues" in config.as_dict()) == negative  # older files and hashes have no such field
        write_checkpoint(content(RecurrentLM(config, 3)), tmp_path / "a.ckpt")
        assert load_model(tmp_path / "a.ckpt").net.config.negative_eigenvalues == negative


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3)), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(UserError, match=r"a\.ckpt: cannot be written: No space left.*stood there is as it was"):
            write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3)), path)
        with pytest.raises(UserError, match=r"b\.ckpt: .*No space left.*; no checkpoint stands there"):
            write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3)), tmp_path / "b.ckpt")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint({}, tmp_path / "file" / "a.ckpt")


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, ("pwned",)


@pytest.mark.reliability
def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({MODEL_KEY: Malicious()}, "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Malicious()))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_checkpoint(Path(name))
    assert not Path("pwned").exists()
    figure("a checkpoint that would run code is refused, and nothing of it runs", "2 of 2 refused")


@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore")  # torch's own, of a save without processes
def test_shards_are_read_and_code_in_them_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import MetadataIndex

    monkeypatch.chdir(tmp_path)
    net, folder = RecurrentLM(SHORT_AND_LONG, 3), Path("last.ckpt")
    written = content(net)
    sharded = {"state_dict": written.pop("state_dict"), "optimizer": {"rate": 0.1}}
    dcp.save(sharded, checkpoint_id=folder, no_dist=True)
    torch.save(written, folder / "meta.pt")
    found = load_model(folder).net.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())

    index, shard = (folder / ".metadata").read_bytes(), next(folder.glob("*.distcp"))
    unpickled = pickle.loads(index)
    weight, rate = "state_dict.net.embedding.weight", "optimizer.rate"  # which is pickled
    unpickled.state_dict_metadata[weight] = unpickled.state_dict_metadata[rate]
    unpickled.storage_data[MetadataIndex(weight)] = unpickled.storage_data[MetadataIndex(rate)]
    harmful = {
        "names posix.mkdir": pickle.dumps(Malicious()),
        "leads out": index.replace(shard.name.encode(), b"../../0.dist"),
        "is no tensor": pickle.dumps(unpickled),
        "not a readable": index[:-9],
    }
    for says, data in harmful.items():
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(UserError, match=says):
            read_checkpoint(folder)
    (folder / ".metadata").write_bytes(harmful["names posix.mkdir"])
    with pytest.raises(UserError, match="was not run"):  # before Lightning would read it to go on
        find_intact_checkpoint(folder)
    assert not Path("pwned").exists()
    (folder / ".metadata").write_bytes(index)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(folder)
    figure("code in a checkpoint in shards is refused, and nothing of it runs", "3 of 3 refused")


def rewritten(path: Path, change: Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo, bytes]]) -> None:
    """Write the archive at ``path`` again with every entry changed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(*change(entry, data))


def compressed(entry: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    """A megabyte of zeros that takes a kilobyte, in place of every tensor."""
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry, bytes(10**6) if "/data/" in entry.filename else data


def leading_out(entry: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    entry.filename = entry.filename.replace("a/data/", "../../outside/")
    return entry, data


def absolute(entry: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    entry.filename = entry.filename.replace("a/data/", "/etc/")
    return entry, data


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("change", "says"), [(compressed, "is compressed"), (leading_out, "leads out"), (absolute, "leads out")]
)
def test_archives_that_are_no_checkpoints_are_refused(
    tmp_path: Path, change: Callable[..., tuple[zipfile.ZipInfo, bytes]], says: str, figure: Figure
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content(RecurrentLM(SHORT_AND_LONG, 3)), path)
    assert read_checkpoint(path)
    rewritten(path, change)
    with pytest.raises(UserError, match=says):
        read_checkpoint(path)
    figure("archives with compressed entries, '..' or absolute names are refused", "refused")


def test_the_checksum_is_the_comment_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3)), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment.startswith(b"mmrec sha256 ")
        assert archive.testzip() is None
    torch.load(path, weights_only=True)  # any other reader of such files may read it too
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\0\0\0\0", b"\0\0\0\1", 1))
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_checkpoint_is_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    contents = []
    for _ in range(3):
        write_checkpoint(content(RecurrentLM(SHORT_AND_LONG, 3)), target, previous)
        contents.append(target.read_bytes())
    assert previous.read_bytes() == contents[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    target.write_bytes(contents[2][:-100])
    assert find_intact_checkpoint(target) == previous
    target.unlink()
    assert runs.find_checkpoint(tmp_path, None, str(previous)) == previous


def test_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint = content(RecurrentLM(SHORT_AND_LONG, 3))
    checkpoint[MODEL_KEY]["version"] = VERSION + 1
    write_checkpoint(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"version {VERSION + 1}"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_what_differs_is_named() -> None:
    checkpoint = content(RecurrentLM(SHORT_AND_LONG, 3))
    check_compatible(checkpoint, RecurrentLM(SHORT_AND_LONG, 3), TOKENIZER)
    other = ModelConfig(dim=16, layers=2, layer_types=("long",), heads=2, ffn_dim=24)
    with pytest.raises(UserError, match="memories"):
        check_compatible(checkpoint, RecurrentLM(other, 3), TOKENIZER)
    turning = replace(SHORT_AND_LONG, negative_eigenvalues=True)
    with pytest.raises(UserError, match="negative_eigenvalues False there, True here"):
        check_compatible(checkpoint, RecurrentLM(turning, 3), TOKENIZER)
    with pytest.raises(UserError, match="negative_eigenvalues True there, False here"):
        check_compatible(content(RecurrentLM(turning, 3)), RecurrentLM(SHORT_AND_LONG, 3), TOKENIZER)
    with pytest.raises(UserError, match="another tokenizer"):
        check_compatible(checkpoint, RecurrentLM(SHORT_AND_LONG, 3), CharacterTokenizer("abd"))


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


def test_names_of_version_1_are_brought_to_those_of_today(tmp_path: Path) -> None:
    path, model = tmp_path / "a.ckpt", content(RecurrentLM(SHORT_AND_LONG, 3))
    head = torch.ones(2)
    model[MODEL_KEY]["version"] = 1
    model["state_dict"]["second.norm.weight"] = head
    model["current_model_state"] = dict(model["state_dict"])
    model["callbacks"] = {"Patience{'monitor': 'val/loss'}": {"wait_count": 3}, "GradientGuard": {"skipped": 1}}
    options = {"second_token": 0.3, "final_lr_share": 0.1, "dropout": 0.2}
    model[PROGRESS_KEY] = {"hyperparameters": options, "carried": None, "random": []}
    write_checkpoint(model, path)
    found = read_checkpoint(path)
    assert found[MODEL_KEY]["version"] == VERSION
    assert found[PROGRESS_KEY]["hyperparameters"] == {"mtp_loss_weight": 0.3, "min_lr_ratio": 0.1, "dropout": 0.2}
    assert found["callbacks"] == {
        "ResumableEarlyStopping{'monitor': 'val/loss'}": {"wait_count": 3},
        "GradientGuard": {"skipped": 1},
    }
    for weights in ("state_dict", "current_model_state"):
        assert torch.equal(found[weights]["mtp_head.norm.weight"], head)
        assert not any(name.startswith("second.") for name in found[weights])
