import lzma
from pathlib import Path

import pyppmd
import pytest
import torch
from conftest import Command

from mmrec.checkpoints.cached import CachedNgrams
from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.inference.compressors import Compressors, ppmd_sizes
from mmrec.inference.reading import CacheOptions


def _sizes(data: bytes) -> dict[str, int]:
    return {
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        "PPMd, order 16": len(pyppmd.compress(data, max_order=16, mem_size=256 << 20)),
    }


def test_bits_per_byte_are_those_of_the_text_alone_and_after_another(text: str, tmp_path: Path) -> None:
    data, before = text[6000:9000].encode(), text[:6000].encode()
    (tmp_path / "before.txt").write_bytes(before)
    alone, after = Compressors(), Compressors(tmp_path / "before.txt")
    for compressors in (alone, after):
        for begin in range(0, len(data), 700):
            compressors.update(data[begin : begin + 700])
    assert alone.compute() == {name: 8 * size / len(data) for name, size in _sizes(data).items()}
    whole, first = _sizes(before + data), _sizes(before)
    expected = {name: 8 * (whole[name] - first[name]) / len(data) for name in whole}
    assert after.compute() == pytest.approx(expected, rel=0.01)  # the last bits of the first are not cut off
    with pytest.raises(UserError, match="cannot be read"):
        Compressors(tmp_path / "none.txt")


def test_sizes_after_each_part_are_those_of_what_was_read_until_then(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text.encode()
    sizes = ppmd_sizes([data[:6000], data[6000:]])
    assert sizes is not None
    assert sizes[1] == _sizes(data)["PPMd, order 16"]
    assert sizes[0] == pytest.approx(_sizes(data[:6000])["PPMd, order 16"], abs=16)
    monkeypatch.setattr("mmrec.inference.compressors.find_spec", lambda name: None)
    assert ppmd_sizes([data]) is None


def test_score_prints_them_beside_the_model_with_a_cache(
    mmrec: Command,
    small_root: Path,
    small_model: LoadedModel,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lightning_logs").symlink_to(small_root / "lightning_logs")
    Path("first.txt").write_text(text[:6000])
    Path("next.txt").write_text(text[6000:9000])
    assert mmrec("read", "first.txt", "--cache", "1", "--save", "first.mem") == 0
    assert "6,000 tokens read, n-grams counted, " in capsys.readouterr().out
    scores = []
    for options in (["--memory", "first.mem"], [], ["--cache", "1"]):
        assert mmrec("score", "next.txt", *options, "--beside") == 0
        out = capsys.readouterr().out
        scores.append(float(out.split(" nats/token")[0].split()[-1]))
        assert "\n  xz -9e: " in out
        assert "\n  PPMd, order 16: " in out
    assert scores[0] < scores[2] < scores[1]
    assert mmrec("score", "next.txt", "--cache", "1", "--cache_text", "first.txt") == 0
    assert float(capsys.readouterr().out.split(" nats/token")[0].split()[-1]) == pytest.approx(scores[0], abs=0.1)
    net = small_model.net
    counting = CacheOptions(1, Path("first.txt")).applied(net, SavedState.empty(net), small_model.tokenizer)
    assert counting.cached is not None
    assert not torch.equal(counting.cached.weights, CachedNgrams.empty(1).weights)  # the end of the text was read
    assert mmrec("score", "next.txt", "--beside_after", "first.txt") == 0
    assert float(capsys.readouterr().out.split("PPMd, order 16: ")[1].split()[0]) < 3
    generate = ("generate", "--memory", "first.mem", "--length", "20")
    assert mmrec(*generate, "--verbatim", "8") == 0
    capsys.readouterr()
    refusals: tuple[tuple[tuple[str, ...], str], ...] = (
        (("generate", "--verbatim", "8"), "--verbatim is for a memory with a cache of n-grams"),
        ((*generate, "--verbatim", "1"), "verbatim is 1; it must be 0, or at least 2"),
        (("read", "next.txt", "--cache", "0", "--save", "x.mem"), "cache is 0; it must be 1 to 4,096 MiB"),
        (("score", "next.txt", "--memory", "first.mem", "--cache", "2"), "has a cache of 1 MiB, not 2"),
        (("score", "next.txt", "--cache_text", "first.txt"), "--cache_text is for a new cache"),
        (("score", "next.txt", "--beside_after", "none.txt"), "none.txt: cannot be read"),
    )
    for command, message in refusals:
        assert mmrec(*command) == 2
        assert message in capsys.readouterr().err
