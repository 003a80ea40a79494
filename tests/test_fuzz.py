"""Fuzzing: whatever is read is read right or refused in one line, and what holds for some input holds for any.

Each target runs on a few hundred inputs, and on thousands for ./scripts/reliability. Inputs are drawn by hypothesis
from a fixed seed; one that fails is made small and printed.
"""

from __future__ import annotations

import encodings.aliases
import io
import json
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FIGURES, REPOSITORY, Figure
from fuzz_files import damaged_checkpoint, damaged_tokens, large_file, manifest, memory_file, other_checkpoint
from fuzz_split import large_split
from fuzz_tokenizers import foreign_tokenizer, prepared_text
from fuzzing import ANY_TEXT, VALUES, Target, altered, damaged, fuzz
from hypothesis import strategies as st

from mmrec.cli import main
from mmrec.core.errors import UserError
from mmrec.core.options import find_config, shipped_configs
from mmrec.core.text_files import check_encoding, decode_text
from mmrec.data.batches import IGNORE_INDEX, SegmentSampler, TrainLoader
from mmrec.data.corpora.base import Document
from mmrec.data.corpora.shakespeare_plays import speeches
from mmrec.data.split import SEPARATOR, split_documents
from mmrec.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    load_tokenizer,
    token_lengths,
)

ENCODINGS = sorted({*encodings.aliases.aliases.values(), "utf-8-sig", "idna", "punycode"})


@cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train("To be, or not to be. D\u00e9j\u00e0 vu \U0001f600 \u4e16\u754c\r\n" * 20, 300)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work in a folder for all targets: one made for each input would take most of the time."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    with chdir(folder):
        yield


def round_trip(data: st.DataObject) -> None:
    """Every tokenizer gives every text back, counts its bytes and characters, and survives being saved."""
    text = data.draw(ANY_TEXT)
    for tokenizer in (ByteTokenizer(), bpe(), *([CharacterTokenizer(text)] if text else [])):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        again = load_tokenizer(json.loads(json.dumps(tokenizer.state()))) if tokenizer is not bpe() else tokenizer
        np.testing.assert_array_equal(again.encode(text), tokens)
        lengths = token_lengths(tokenizer)[tokens].sum(axis=0) if tokenizer is not bpe() else None
        assert lengths is None or lengths.tolist() == [len(text.encode()), len(text)]


def streamed(data: st.DataObject) -> None:
    """Any tokens, also those that are no text, come out of the stream decoder as out of decode."""
    tokenizer = data.draw(st.sampled_from([ByteTokenizer(), bpe()]))
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == tokenizer.decode(tokens)


def tokenizer_state(data: st.DataObject) -> None:
    """What is no tokenizer is refused; what is one can be used."""
    match data.draw(st.integers(0, 3)):
        case 0:
            state: Any = data.draw(VALUES)
        case 1:
            known = st.sampled_from([{"name": "characters", "alphabet": "abc"}, {"name": "bytes"}])
            state = altered(data.draw(known), data)
        case 2:
            state = {"name": "bpe", "model": json.dumps(altered(json.loads(bpe().state()["model"]), data))}
        case _:
            state = {"name": "bpe", "model": damaged(bpe().state()["model"].encode(), data).decode(errors="replace")}
    try:
        tokenizer = load_tokenizer(state)
    except UserError:
        return
    assert tokenizer.vocab_size >= 1
    tokenizer.decode([0, tokenizer.vocab_size - 1])
    try:
        tokens = tokenizer.encode("abc")
    except UserError:
        return
    assert all(token < tokenizer.vocab_size for token in tokens)


def every_token_once(data: st.DataObject) -> None:
    """Every token is predicted once an epoch: any batch, length, segment, number of processes, place of a resume."""
    world, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 40))
    total = data.draw(st.integers(max(length + 1, 2 * world * rows), 400))
    segment, seed = data.draw(st.integers(1, 500)), data.draw(st.integers(0, 2**40))
    groups = data.draw(st.integers(1, 5))
    # The processes that it began with, and those that it went on with: the rows are the same.
    cuts = [(1, world * rows), (world, rows), (world * rows, 1)]
    before, after = data.draw(st.sampled_from(cuts)), data.draw(st.sampled_from(cuts))

    def loaders(cut: tuple[int, int]) -> list[TrainLoader]:
        tokens, (world, rows) = np.arange(total, dtype=np.uint16), cut
        streams = (
            SegmentSampler(tokens, rows, length, seed, segment, 0.5, groups, rank, world) for rank in range(world)
        )
        return [TrainLoader(stream) for stream in streams]

    first, second = loaders(before), loaders(after)
    place = data.draw(st.integers(0, 2 * len(first[0])))
    predicted: list[int] = []

    def take(loader: TrainLoader, end: int) -> None:
        while loader.position < end:
            batch = next(iter(loader))
            scored = batch.targets != IGNORE_INDEX
            assert ((batch.inputs[scored] + 1) % total == batch.targets[scored]).all()
            predicted.extend(batch.targets[scored].tolist())

    for loader in first:
        loader.position = place // len(loader) * len(loader)  # the start of the epoch
        take(loader, place)
    state = json.loads(json.dumps(first[0].state_dict()))
    for loader in second:
        loader.load_state_dict(state)
        take(loader, (place // len(loader) + 1) * len(loader))
    assert sorted(predicted) == list(range(total))


def text_file(data: st.DataObject) -> None:
    """The bytes of a file in any encoding are text that UTF-8 can hold, or refused."""
    encoding = data.draw(st.sampled_from(ENCODINGS))
    raw = data.draw(st.binary(max_size=40) | ANY_TEXT.map(str.encode))
    try:
        check_encoding(encoding)
        text = decode_text(raw, Path("text.txt"), encoding)
    except UserError:
        return
    assert text.encode("utf-8").strip()


def play(data: st.DataObject) -> None:
    """Speeches of any text are found in time, without marks of the file's own."""
    parts = st.sampled_from(["**", "*", "_", "[", "]", "\\", "#", "\n", "\n\n", "1\\.", "HAMLET", " ", "&amp;"])
    text = "".join(data.draw(st.lists(parts | ANY_TEXT, max_size=30)))
    assert "\n\n\n" not in speeches(text)


def documents(data: st.DataObject) -> None:
    """A split loses no document, cuts none of several, and never trains on what validates."""
    texts = data.draw(st.lists(ANY_TEXT.filter(bool), min_size=1, max_size=8))
    share = data.draw(st.floats(0.01, 0.99))
    train, val, split = split_documents([Document(str(i), text) for i, text in enumerate(texts)], share)
    if len(set(texts)) == 1:
        assert train + val == texts[0]
        return
    assert train
    assert val
    if split["rule"] == "whole documents":
        assert len(train) + len(val) + len(SEPARATOR) == len(SEPARATOR.join(texts))
    else:
        (largest,) = {text for text in texts if split["rule"].endswith(f" {texts.index(text)}")}
        copies = [text for index, text in enumerate(texts) if text != largest or index == texts.index(largest)]
        # The separators: of the documents of each part, the two of the one that is cut among them.
        assert len(train) + len(val) == len(SEPARATOR.join(copies))
        assert any(val.endswith(largest[cut:]) and largest[:cut] in train for cut in range(1, len(largest)))


def config_file(data: st.DataObject) -> None:
    """A config file may say anything: it is taken, or refused in one line."""
    shipped = yaml.safe_load(find_config(data.draw(st.sampled_from(sorted(shipped_configs())))).read_text())
    if data.draw(st.booleans()):
        text = yaml.safe_dump(altered(shipped or {}, data))
    else:
        text = damaged(yaml.safe_dump(shipped).encode(), data).decode(errors="replace")
    path = Path("config.yaml")
    path.write_text(text)
    assert_handled(["fit", "--config", str(path), "--print_config"])


def arguments(data: st.DataObject) -> None:
    """Arguments may be anything: the command does its work, or refuses in one line."""
    command, options = data.draw(st.sampled_from(COMMANDS))
    words = st.sampled_from(["sample", "tokens", "config.yaml", "0", "-1", "0.5", "bytes", "", "-", "\udcff", "[]"])
    parts = st.sampled_from([f"--{option}" for option in options.split()]) | words | st.text(max_size=5)
    joined = st.builds("--{}={}".format, st.sampled_from(options.split()), words | VALUES.map(str))
    drawn = data.draw(st.lists(parts | joined, max_size=5))
    assert_handled([*command, *(argument.replace("\0", "") for argument in drawn)])  # no system passes zeros on


COMMANDS = [
    (["prepare", "--mirror=nowhere"], "output_dir input_file input_dir val_split tokenizer vocab_size"),
    (["prepare", "--verify"], "output_dir force vocab_size encoding glob corpus"),
    (["generate"], "ckpt prompt length temperature top_k top_p seed run root"),
    (["validate"], "ckpt_path run data.corpus trainer.devices model.config.dim"),
    (["fit", "--print_config"], "config data.seq_len model trainer.max_steps last run"),
]
"""Commands that neither train nor reach the network, and options of theirs."""


def assert_handled(args: list[str]) -> None:
    """Run a command: it ends well, or with status 2 after one line."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            status = main(args)
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            torch.set_flush_denormal(False)  # as in conftest
    assert status in (0, 2)
    if status == 2:
        assert errors.getvalue().count("\n") == 1, errors.getvalue()


TARGETS: list[tuple[Target, int, int]] = [
    (round_trip, 200, 20_000),
    (streamed, 200, 15_000),
    (tokenizer_state, 200, 6_000),
    (foreign_tokenizer, 300, 10_000),
    (prepared_text, 60, 2_000),
    (every_token_once, 100, 8_000),
    (text_file, 400, 20_000),
    (play, 200, 10_000),
    (documents, 200, 10_000),
    (large_split, 100, 3_000),
    (damaged_tokens, 200, 6_000),
    (manifest, 200, 6_000),
    (damaged_checkpoint, 100, 5_000),
    (other_checkpoint, 100, 4_000),
    (memory_file, 100, 3_000),
    (large_file, 200, 10_000),
    (config_file, 10, 400),
    (arguments, 30, 2_000),
]
"""What is fuzzed, and on how many inputs: always, and for the table of reliability."""


@pytest.mark.reliability
@pytest.mark.parametrize(("target", "few", "many"), [pytest.param(*row, id=row[0].__name__) for row in TARGETS])
def test_any_input(target: Target, few: int, many: int, figure: Figure) -> None:
    inputs = few if FIGURES is None else many
    assert fuzz(target, inputs) >= inputs
    figure(promise_of(target), f"{inputs:,} inputs")


def promise_of(target: Target) -> str:
    promise = " ".join(str(target.__doc__).split()).rstrip(".")
    return promise[0].lower() + promise[1:]


def test_every_target_has_its_row_in_the_table() -> None:
    page = (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8")
    for target, _, many in TARGETS:
        assert f"| {promise_of(target)} | `tests/test_fuzz.py::test_any_input` | {many:,} inputs |" in page


def test_many_are_a_hundred_thousand() -> None:
    assert sum(many for _, _, many in TARGETS) >= 100_000
