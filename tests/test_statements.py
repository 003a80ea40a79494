"""What the READMEs, the docs and the configs' comments say is what the program computes.

Each test reads a figure where it is written and works it out anew. Where a sentence is rewritten, the pattern that
finds its figures here goes with it: a pattern that finds nothing fails. Figures measured once, such as losses and
seconds, stay as they are; where two pages quote the same measurement, they are compared.
"""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SHAKESPEARE, Command
from statements import CONFIGS, LARGE, VOCABULARY, content, find, model, number, page, same

from mmrec.baselines.models import GPT, make_baseline, size
from mmrec.baselines.training import HYPERPARAMETERS
from mmrec.bench.measurements import hyperparameters_of, state_bytes
from mmrec.checkpoints.learned import PART
from mmrec.checkpoints.state_file import SavedState, save_memory
from mmrec.data.batches import SegmentSampler
from mmrec.data.pipeline.records import LONGEST
from mmrec.data.split import default_split
from mmrec.evals.models import layer_parameters, make_model
from mmrec.evals.recipes import SMALL
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.serve.limits import Limits
from mmrec.tokenizers.bytes import ByteTokenizer
from mmrec.training.mtp import MTPHead
from mmrec.training.options import DataOptions

READMES = ("README.md", "README.tr.md")


def test_rounding_is_told_from_error() -> None:
    assert same("17,400", 17_448)
    assert not same("17,500", 17_448)
    assert same("0.72", 0.723)
    assert not same("0.71", 0.723)
    assert same("1.517.984", 1_517_984, "README.tr.md")
    assert not same("1,536,000", 1_517_984)
    assert same("10.0", 10.04)
    assert not same("10.1", 10.04)


# What the figures are worked out from


def comment(config: str) -> str:
    """Return the first lines of a config as one."""
    return CONFIGS[config].read_text(encoding="utf-8").split("\nmodel:")[0].replace("\n# ", " ")


def parameters(vocab_size: int = 65, **config: Any) -> int:
    with torch.device("meta"):
        return RecurrentLM(ModelConfig(**config), vocab_size).parameter_count()


def training_tokens() -> np.ndarray:
    """Return as many tokens as Tiny Shakespeare's training part has."""
    characters = int(number(find(r"`tiny_shakespeare` \| ([\d,]+) characters", "docs/data.md")[1]))
    if SHAKESPEARE.exists():
        assert characters == SHAKESPEARE.stat().st_size
    return np.zeros(int(characters * (1 - default_split(characters)[0])), np.uint16)


def stream(config: str, **changed: Any) -> SegmentSampler:
    data = content(config)["data"] | changed
    defaults = DataOptions()
    return SegmentSampler(
        training_tokens(),
        data["batch_size"],
        data["seq_len"],
        segment_len=data.get("segment_len", defaults.segment_len),
        interleave=data.get("interleave", defaults.interleave),
    )


def updates(config: str) -> int:
    trainer = content(config)["trainer"]
    return int(trainer["max_steps"]) if "max_steps" in trainer else len(stream(config)) * int(trainer["max_epochs"])


def read(batches: SegmentSampler, steps: int) -> tuple[int, set[int]]:
    """Return the tokens that ``steps`` updates read, and the lengths of their rows."""
    shapes = [batches.batch(step).inputs.shape for step in range(steps)]
    return sum(rows * length for rows, length in shapes), {length for _, length in shapes}


# Sizes


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_sizes(name: str) -> None:
    exact = re.findall(r"`(quickstart|tiny)` \((?:65 \w+ )?(\d{1,3}(?:[.,]\d{3}){1,2})\b", page(name))
    assert dict(exact).keys() == {"quickstart", "tiny"}
    for config, written in exact:
        assert number(written, name) == model(config, 65).parameter_count(), config
    rounded = re.findall(r"`(mini|small|base)` \((\d+) M\)", page(name))
    assert len(rounded) == 3
    for config, written in rounded:
        assert same(written, model(config, VOCABULARY.get(config, LARGE)).parameter_count() / 1e6), config


def test_the_table_of_sizes_in_training() -> None:
    row = r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| ([\d,.]+) M \| ([\d,]+) \|"
    rows = re.findall(row, page("docs/training.md"), re.M)
    assert {row[0] for row in rows} == {name for name in CONFIGS if "/" not in name}
    for config, layers, width, written, vocab_size in rows:
        net = model(config, int(number(vocab_size)))
        assert (int(layers), int(width)) == (net.config.layers, net.config.dim), config
        assert same(written, net.parameter_count() / 1e6), config


@pytest.mark.parametrize("config", ["quickstart", "tiny", "mini", "portable-tiny"])
def test_sizes_in_the_comments_of_configs(config: str) -> None:
    found = re.search(r"([\d.]+)M parameters", comment(config))
    assert found
    assert same(found[1], model(config, VOCABULARY[config]).parameter_count() / 1e6)


def test_sizes_in_experiments() -> None:
    """Where a row says layers, width, feed-forward width and heads, its parameters follow."""
    log, words = "docs/experiments.md", {"six": 6, "eight": 8, "ten": 10}
    shape = r"(six|eight|ten) layers of (?:width )?(\d+), feed-forward (\d+)(?:, (\d+) heads)? \(([\d.]+) M\)"
    said = re.findall(shape, page(log))
    assert len(said) >= 5
    for layers, dim, ffn_dim, heads, written in said:
        count = parameters(dim=int(dim), layers=words[layers], ffn_dim=int(ffn_dim), heads=int(heads or 4))
        assert same(written, count / 1e6), (layers, dim, ffn_dim)
    plain, quick = find(r"short, long with ([\d.]+) M parameters in .*? short with ([\d.]+) M", log).groups()
    assert same(plain, parameters(dim=128, layers=4, layer_types=("short", "long"), ffn_dim=256) / 1e6)
    assert same(quick, model("quickstart", 65).parameter_count() / 1e6)
    head = find(r"output layer of its own has ([\d,]+) parameters more", log)[1]
    assert number(head) == model("quickstart", 65).embedding.weight.numel()


def test_sizes_in_bench() -> None:
    ours, gpt = make_baseline("mmrec", 65, 64), make_baseline("gpt", 65, 64)
    for name, net in (("mmrec", ours), ("GPT", gpt)):
        assert same(find(rf"\| {name}, ([\d.]+) M \|", "docs/bench.md")[1], size(net) / 1e6), name
    more = find(r"head adds ([\d,]+) parameters", "docs/bench.md")[1]
    assert isinstance(ours, RecurrentLM)
    assert isinstance(gpt, GPT)
    assert number(more) == sum(p.numel() for p in MTPHead(ours.config.dim).parameters())
    memory = r"^\| ([\d,]+)(?:, [^|]*)? \|[^|]*\|[^|]*\|[^|]*\| (\d+) KiB, GPT ([\d.]+) ([KMG])iB \|"
    rows = re.findall(memory, page("docs/bench.md"), re.M)
    assert len(rows) == 3
    for before, state, other, unit in rows:
        assert same(state, 4 * ours.state_size() / 2**10), before
        keys_and_values = state_bytes(gpt.zero_state(1, 64)) / 64 * (number(before) + 64)
        assert same(other, keys_and_values / 2 ** {"K": 10, "M": 20, "G": 30}[unit]), before


def test_sizes_in_evals() -> None:
    written = find(r"shape \(([\d.]+) M parameters with bytes\)", "docs/evals.md")[1]
    assert same(written, model("quickstart", ByteTokenizer().vocab_size).parameter_count() / 1e6)
    rows = re.findall(r"^\| (mmrec|GPT|LSTM)(?:, 3 seeds)? \|.* ([\d,]{7,}) \|$", page("docs/evals.md"), re.M)
    assert len(rows) == 6
    for task, part in (("mqar", rows[:3]), ("copy", rows[3:])):
        for name, count in part:
            net = make_model(name.lower(), SMALL[task].config, 2, 64)
            assert number(count) == layer_parameters(net), (task, name)


def test_the_file_of_a_memory(tmp_path: Path) -> None:
    written, config = find(r"small file \((\d+) kB with `(\w+)`\)", "docs/memory.md").groups()
    net = RecurrentLM(ModelConfig(**content(config)["model"]["config"]), 65)
    save_memory(tmp_path / "a.mem", SavedState.empty(net), 64 * "a")
    assert same(written, (tmp_path / "a.mem").stat().st_size / 1000)


def test_arithmetic_of_scale() -> None:
    scale = "docs/scale.md"
    rate = float(find(r"assumes (\d+) TFLOP/s a GPU", scale)[1]) * 1e12 * 3600
    tokens = float(find(r"about (\d+) billion tokens", scale)[1]) * 1e9
    for config, unit in (("base", "M"), ("7b", "G")):
        count = model(config, LARGE).parameter_count()
        row = rf"training `{config}` \(([\d.]+) {unit}\).*?([\d.]+e\d+) operations: ([\d,]+) GPU hours"
        written, operations, hours = find(row, scale).groups()
        assert same(written, count / {"M": 1e6, "G": 1e9}[unit])
        assert math.isclose(float(operations), 6 * count * tokens, rel_tol=0.01)
        assert same(hours, 6 * count * tokens / rate)
    each, whole = find(r"are (\d+) bytes a parameter, (\d+) GB", scale).groups()
    assert same(whole, int(each) * model("7b", LARGE).parameter_count() / 1e9)


# Runs


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_first_run(name: str) -> None:
    """What it printed agrees with itself, and with its row in the study of plans."""
    said = r"training +([\d,]+) updates of (\d+) x (\d+) tokens: ([\d.]+) M"
    planned, rows, length, tokens = find(said, name).groups()
    assert same(tokens, number(planned) * int(rows) * int(length) / 1e6)
    made, score = find(r"best\.ckpt, ([\d,]+) updates", name)[1], find(r"validation +([\d.]+) bits", name)[1]
    memory, counted = find(r"memory +([\d.]+) bits/byte on the first ([\d,]+) tokens", name).groups()
    study = find(r"\n\| 8b05fef \|[^\n]*", "docs/planning-study.md")[0]
    assert f"| {planned} | {made} | {score} | {memory} ({counted};" in study


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_table_of_runs(name: str) -> None:
    """Updates or epochs, rows x tokens, parameters, tokens read."""
    rows = re.findall(r"^\| `(\w+)`: (.*?) \| ([\d.,]+) M \| ([\d.,]+) M \|", page(name), re.M)
    assert [row[0] for row in rows] == ["quickstart", "tiny"]
    for config, how, size_of_it, tokens in rows:
        data, trainer = content(config)["data"], content(config)["trainer"]
        assert f"{data['batch_size']} x {data['seq_len']}" in how
        said = [number(one, name) for one in re.findall(r"\d[\d.,]*\b", how)]
        assert (trainer["max_steps"] if "max_steps" in trainer else trainer["max_epochs"]) in said
        assert same(size_of_it, model(config, 65).parameter_count() / 1e6, name)
        assert same(tokens, read(stream(config), updates(config))[0] / 1e6, name)


def test_the_comment_of_quickstart() -> None:
    said = r"([\d,]+) updates of (\d+) rows of (\d+) or (\d+) tokens, \D+ ([\d,]+) tokens"
    found = re.search(said, comment("quickstart"))
    assert found
    tokens, lengths = read(stream("quickstart"), updates("quickstart"))
    assert number(found[1]) == updates("quickstart")
    assert int(found[2]) == content("quickstart")["data"]["batch_size"]
    assert {int(found[3]), int(found[4])} == lengths
    assert number(found[5]) == tokens


def test_runs_of_bench() -> None:
    ours, gpt = HYPERPARAMETERS["mmrec"], HYPERPARAMETERS["gpt"]
    said = find(
        r"Ours is trained for ([\d,]+) updates of (\d+) x (\d+), in which it reads ([\d,]+) tokens, as its rows are "
        r"cut to (\d+) or (\d+); the GPT for ([\d,]+) of (\d+) x (\d+), ([\d,]+) tokens",
        "docs/bench.md",
    )
    steps, rows, length, tokens, short, long, their_steps, their_rows, their_length, their_tokens = map(
        number, said.groups()
    )
    assert (rows, length) == (ours.batch_size, ours.seq_len)
    assert (their_rows, their_length) == (gpt.batch_size, gpt.seq_len)
    assert their_tokens == their_steps * their_rows * their_length == steps * rows * length
    batches = stream("quickstart", batch_size=int(rows), seq_len=int(length))
    assert (tokens, {short, long}) == read(batches, int(steps))

    asked, cut = map(number, find(r"after ([\d,]+) tokens \(([\d,]+) of them read by ours", "docs/bench.md").groups())
    assert cut == read(batches, int(asked / rows / length))[0]
    said = find(r"ours ([\d,]+) updates of (\d+) x (\d+) at 4e-3", "docs/bench.md")
    chosen = hyperparameters_of("mmrec", time_to_target=True)
    steps, rows, length = map(number, said.groups())
    assert (steps, rows, length) == (chosen.steps(0), chosen.batch_size, chosen.seq_len)


def test_what_evals_reads() -> None:
    """Millions of characters read, and the rows' carried length, of the training that evals.md shows."""
    trained, millions = find(r"\(([\d.]+) M characters, ([\d.]+) M read\)", "docs/evals.md").groups()
    command = find(r"mmrec fit --config quickstart --run plays [^`]*", "docs/evals.md")[0]
    rows, length, steps = (
        int(re.findall(rf"--{option} (\d+)", command)[0])
        for option in ("data.batch_size", "data.seq_len", "trainer.max_steps")
    )
    batches = SegmentSampler(np.zeros(int(float(trained) * 1e6), np.uint8), rows, length)
    assert same(millions, read(batches, steps)[0] / 1e6)


# Settings


def test_the_table_of_options_is_that_of_tiny(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """The last column of training.md's table of options, where it holds numbers or names."""
    assert mmrec("fit", "--config=tiny", "--print_config") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    rows = re.findall(r"^\| (`--[^|]*) \|[^|]*\| ([^|]*) \|", page("docs/training.md"), re.M)
    compared = 0
    for names, values in rows:
        options = re.findall(r"--([\w.]+)", names)
        for option, value in zip(options, values.split(", "), strict=len(options) > 1):
            if not value or value in ("an epoch", "`version_N`"):
                continue
            found: Any = settings
            for part in option.split("."):
                found = found[part]
            assert str(found) == value, option
            compared += 1
    assert compared >= 12


def test_constants_that_docs_name() -> None:
    assert int(find(r"\*\*Learned\*\* scores (\d+) tokens", "docs/training.md")[1]) == PART
    assert int(find(r"records over (\d+) MiB", "docs/data.md")[1]) * 2**20 == LONGEST
    shares = find(r"([\d.]+) under 1 MB, ([\d.]+) from there, ([\d.]+) from 1 GB on", "docs/data.md").groups()
    assert [float(share) for share in shares] == [default_split(size)[0] for size in (999_999, 10**6, 10**9)]
    said = find(
        r"read at a time \((\d+)\).*?`--limits.batch`, (\d+)\).*? or wait \((\d+);.*? "
        r"bytes of a request \((\d) MiB\), tokens to read \(([\d,]+)\) "
        r"and to write \(([\d,]+)\)",
        "docs/serve.md",
    )
    running, batch, waiting, mebibytes, prompt, written = (int(number(one)) for one in said.groups())
    limits = Limits()
    assert (limits.running, limits.batch, limits.waiting) == (running, batch, waiting)
    assert limits.body_bytes == mebibytes << 20
    assert (limits.prompt_tokens, limits.max_tokens) == (prompt, written)


# Figures that two pages quote


def test_the_readme_and_bench_quote_the_same_ratios() -> None:
    said = find(
        r"training is ([\d.]+) times as fast with sequences of (\d+) tokens, ([\d.]+) times at ([\d,]+) and "
        r"([\d.]+) times at ([\d,]+); decoding after ([\d,]+) tokens is (\d+) times",
        "README.md",
    ).groups()
    table = dict(re.findall(r"^\| ([\d,]+) \|[^|]*\|[^|]*\| ([\d.]+) \(", page("docs/bench.md"), re.M))
    for ratio, length in ((said[0], said[1]), (said[2], said[3]), (said[4], said[5]), (said[7], said[6])):
        assert same(ratio, float(table[length])), length


def test_training_and_experiments_quote_the_same_figures() -> None:
    means = find(r"went from ([\d.]+) to ([\d.]+) \(means of seeds", "docs/training.md").groups()
    log = page("docs/experiments.md")
    rows = re.findall(
        r"^\| (?:`quickstart` by `mmrec fit`, none: |the same, \*\*eight groups)[^|]*\| ([\d.]+) \(", log, re.M
    )
    assert tuple(rows) == means
    share = find(r"an update takes ([\d.]+) of the time", "docs/training.md")[1]
    whole, half = find(r"AVX512-BF16\) \| (\d+) -> (\d+) ms", "docs/experiments.md").groups()
    assert same(share, int(half) / int(whole))


# The log of experiments


def test_every_row_of_the_log_says_when_it_was_recorded() -> None:
    rows = [line for line in page("docs/experiments.md").splitlines() if line.startswith("|")]
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        if not (row.startswith("|---") or following.startswith("|---")):
            assert re.search(r"\| \d{4}-\d{2}-\d{2} [0-9a-f]{7} \|$", row), row


def test_the_commits_of_the_log_are_of_its_days() -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("there is no whole history here")
    recorded = set(re.findall(r"(\d{4}-\d{2}-\d{2}) ([0-9a-f]{7})\b", page("docs/experiments.md")))
    for day, commit in recorded:
        assert git("log", "-1", "--format=%as", commit) == day, commit
