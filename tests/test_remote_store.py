"""Tokens on object storage: the same batches as from a local folder, in a cache of bounded size."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
import numpy as np
import pytest
import torch
from conftest import Command
from helpers import fit, last

from mmrec.core.errors import UserError
from mmrec.data import remote_store as remote
from mmrec.data.batches import SegmentSampler, StatefulEvalLoader
from mmrec.data.remote_store import RemoteTokens, open_remote_tokens
from mmrec.data.store import open_tokens


@pytest.fixture
def url(prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The token folder ``prepared`` in a bucket, read in blocks of 512 bytes."""
    monkeypatch.setattr(remote, "BLOCK", 512)
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    bucket = fsspec.filesystem("memory")
    for path in prepared.iterdir():
        bucket.pipe(f"/bucket/tokens/{path.name}", path.read_bytes())
    yield "memory://bucket/tokens"
    bucket.rm("/bucket", recursive=True)


def test_any_index_gives_what_a_memory_map_gives(prepared: Path, url: str) -> None:
    here, there = open_tokens(prepared).train, open_remote_tokens(url, 4096).train
    assert len(there) == len(here)
    choose = np.random.default_rng(0)
    for _ in range(50):
        index = choose.integers(len(here), size=(3, 70))
        np.testing.assert_array_equal(there[index], here[index])
        first, last = sorted(choose.integers(len(here), size=2))
        np.testing.assert_array_equal(there[first:last], here[first:last])


def test_the_stream_is_the_same(prepared: Path, url: str) -> None:
    here, there = open_tokens(prepared), open_remote_tokens(url, 4096)
    streams = [SegmentSampler(tokens.train, 3, 32, seed=1, segment_len=100) for tokens in (here, there)]
    for number in range(0, 2 * len(streams[0]), 5):
        one, other = (stream.batch(number) for stream in streams)
        for a, b in zip(one[:3], other[:3], strict=True):
            assert torch.equal(a, b)
        assert one.stream == other.stream
    batches = zip(StatefulEvalLoader(here.val, 100), StatefulEvalLoader(there.val, 100), strict=True)
    for near, far in batches:
        assert torch.equal(near.inputs, far.inputs)


def test_the_cache_is_bounded_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    tokens = open_remote_tokens(url, 2048).train
    assert isinstance(tokens, RemoteTokens)
    assert len(tokens) * tokens.dtype.itemsize > 4096
    tokens[0 : len(tokens)]
    assert os.fstat(tokens._file.fileno()).st_size == 1024
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_was_full_for_a_while(prepared: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that could not be kept is fetched again, and the others stay what they are."""
    here, there = open_tokens(prepared).train, open_remote_tokens(url, 2048).train
    assert isinstance(there, RemoteTokens)
    there[0:512]
    file = there._file
    monkeypatch.setattr(there, "_file", Full(file))
    with pytest.raises(OSError, match="No space"):
        there[512:1024]
    monkeypatch.setattr(there, "_file", file)
    for first in (256, 512, 0, 768):
        np.testing.assert_array_equal(there[first : first + 256], here[first : first + 256])


class Full:
    """A file that takes half of what is written, then has no room."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.file = file.seek, file

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_training_learns_the_same(mmrec: Command, prepared: Path, url: str) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=8", "--run=here")) == 0
    assert mmrec(*fit(Path("x"), f"--data.data_dir={url}", "--trainer.max_steps=8", "--run=there")) == 0
    here, there = (last(run)["state_dict"] for run in ("here", "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_damaged_folder_is_named_by_its_address(url: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/tokens/tokenizer.json", b"{")
    with pytest.raises(UserError, match=r"^memory://bucket/tokens/tokenizer\.json: is damaged"):
        open_remote_tokens(url, 4096)


def test_an_outage_is_waited_for(
    prepared: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training of weeks outlives two minutes without a network; a file that is not there is not waited for."""
    bucket, pauses = fsspec.filesystem("memory"), list[float]()
    cat_file = bucket.cat_file
    answers: Iterator[OSError | None] = iter([ConnectionError("no route"), TimeoutError("later"), None])

    def unsteady(path: str, **span: int) -> bytes:
        if (error := next(answers)) is not None:
            raise error
        content: bytes = cat_file(path, **span)
        return content

    monkeypatch.setattr("time.sleep", pauses.append)
    tokens = open_remote_tokens(url, 2048).train
    monkeypatch.setattr(type(bucket), "cat_file", lambda _, path, **span: unsteady(path, **span))
    np.testing.assert_array_equal(tokens[:100], open_tokens(prepared).train[:100])
    assert pauses == [1, 2]
    assert "mmrec: memory://bucket/tokens/train.bin: cannot be reached: later; trying again in 2 s" in (
        capsys.readouterr().err
    )

    pauses.clear()
    answers = iter([ConnectionError("no route")] * 100)
    with pytest.raises(UserError, match="cannot be reached: no route"):
        tokens[500:600]
    assert 100 < sum(pauses) < 150

    pauses.clear()
    answers = iter([FileNotFoundError("train.bin")])
    with pytest.raises(UserError, match=r"cannot be reached: train\.bin"):
        tokens[500:600]
    assert not pauses


def test_a_file_that_was_cut_short(url: str) -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe("/bucket/tokens/train.bin", bucket.cat("/bucket/tokens/train.bin")[:-100])
    tokens = open_remote_tokens(url, 4096).train
    with pytest.raises(UserError, match="it is not the file of its manifest"):
        tokens[len(tokens) - 60 : len(tokens)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.data_dir=memory://nothing/there"], "memory://nothing/there/manifest.json: cannot be reached: "),
        (["--data.data_dir=s4://bucket/x"], "s4://bucket/x/manifest.json: cannot be reached: Protocol not known: s4"),
        (["--data.cache_gb=0"], "data.cache_gb is 0.0; it must be more than 0"),
    ],
)
def test_bad_urls(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert mmrec(*fit(prepared, *options)) == 2
    assert message in capsys.readouterr().err
