"""docs/model.md says what the model is: its sizes, initial values and constants are those of the code."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from statements import CONFIGS, LARGE, VOCABULARY, content, find, model, number, page, same
from torch.nn import functional as F

from mmrec.model import INITIAL_SCALE, RGLRU, GatedDeltaNet, ModelConfig, RecurrentLM, RMSNorm
from mmrec.model.ops import chunked
from mmrec.model.ops.reference import LRU_EPSILON, RESET_LOG_DECAY
from mmrec.model.token_counts import INITIAL_STRENGTH, SPAN

PAGE = "docs/model.md"


def test_the_table_of_sizes() -> None:
    row = r"^\| `([\w-]+)` \| ([^|]*) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,.]+) \|$"
    rows = re.findall(row, page(PAGE), re.M)
    assert {row[0] for row in rows} == {name for name in CONFIGS if "/" not in name}
    for config, layers, vocab_size, parameters, numbers, of_convolutions, kilobytes in rows:
        assert number(vocab_size) == VOCABULARY.get(config, LARGE)
        net = model(config, int(number(vocab_size)))
        count, kinds = re.fullmatch(r"(?:(\d+): )?(.*?)(?: in turn)?", layers).groups()  # type: ignore[union-attr]
        pattern = kinds.split(", ")
        assert net.layer_types() == (pattern * net.config.layers)[: net.config.layers]
        assert net.config.layers == int(count or len(pattern))
        assert number(parameters) == net.parameter_count(), config
        assert number(numbers) == net.state_size(), config
        past = sum(past.numel() for past, _ in net.zero_state(1, torch.device("meta")))
        assert number(of_convolutions) == past, config
        assert same(kilobytes, 4 * net.state_size() / 1000), config


@pytest.mark.parametrize("config", ["quickstart", "tiny", "1b", "portable-tiny"])
def test_sizes_by_layer(config: str) -> None:
    net = model(config, 65)
    shape = net.config
    letters = {"D": shape.dim, "H": shape.heads, "F": shape.ffn_dim, "K": shape.dim // shape.heads}

    def value(formula: str) -> float:
        python = re.sub(r"(?<=[\dA-Z]) (?=[A-Z])", " * ", formula.replace("²", " ** 2"))
        assert re.fullmatch(r"[\dDHFK+*/ ]+", python)
        return float(eval(python, {}, letters))

    said = dict(
        re.findall(
            r"^\| (`short`|`long`|`portable`|feed-forward|two norms of a block) \| ([^|]*) \|", page(PAGE), re.M
        )
    )
    states = dict(re.findall(r"^\| `(short|long|portable)` \| [^|]* \| ([^|]*) \|$", page(PAGE), re.M))
    assert int(find(r"By layer, with C = (\d+)", PAGE)[1]) == shape.conv_width
    for kind, block, state in zip(
        net.layer_types(), net.blocks, net.zero_state(1, torch.device("meta")), strict=True
    ):
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in block.named_children()}
        assert value(said[f"`{kind}`"]) == parts["memory"]
        assert value(said["feed-forward"]) == parts["ffn"]
        assert value(said["two norms of a block"]) == parts["memory_norm"] + parts["ffn_norm"]
        assert value(states[kind]) == sum(tensor.numel() for tensor in state)


def test_initial_values() -> None:
    shape = ModelConfig(dim=64, layers=2, layer_types=("short", "long"), heads=8)
    net = RecurrentLM(shape, 65)
    short, long = (block.get_submodule("memory") for block in net.blocks)
    assert isinstance(short, RGLRU)
    assert isinstance(long, GatedDeltaNet)
    low, high = find(
        r"half-lives of (\d+) to (\d+) tokens where r = 1/2, log-spaced over the channels", PAGE
    ).groups()
    rate = short.DECAY_SCALE * F.softplus(short.rate) / 2
    spaced = torch.exp(torch.linspace(math.log(int(low)), math.log(int(high)), shape.dim))
    torch.testing.assert_close(math.log(2) / rate, spaced)
    low, high = find(r"half-lives of (\d+) to ([\d,]+) tokens where the softplus is 1", PAGE).groups()
    spaced = torch.exp(torch.linspace(math.log(int(low)), math.log(number(high)), shape.heads))
    torch.testing.assert_close(math.log(2) / long.log_rate.exp(), spaced)
    torch.testing.assert_close(F.softplus(long.decay_bias), torch.ones(shape.heads))
    assert not any(part.any() for layer in net.zero_state(1) for part in layer)
    assert long.beta_bias is not None
    assert not any(bias.any() for bias in (short.r_bias, short.i_bias, long.beta_bias))

    assert float(find(r"normal, standard deviation ([\d.]+) / √inputs", PAGE)[1]) == INITIAL_SCALE
    assert float(find(r"embedding \| normal, ([\d.]+) / √D", PAGE)[1]) == INITIAL_SCALE
    spread = INITIAL_SCALE / 8
    assert float(short.project.weight.detach().std()) == pytest.approx(spread, rel=0.05)
    assert float(net.embedding.weight.detach().std()) == pytest.approx(spread, rel=0.05)
    assert float(short.output.weight.detach().std()) == pytest.approx(spread / (2 * shape.layers) ** 0.5, rel=0.05)
    assert float(short.conv.weight.detach().abs().max()) == pytest.approx(shape.conv_width**-0.5, rel=0.05)


def test_constants() -> None:
    assert float(find(r"= -(\d+)\\,\\mathrm\{sp\}\(\\Lambda\)", PAGE)[1]) == RGLRU.DECAY_SCALE
    assert 10 ** -int(find(r"varepsilon = 10\^\{-(\d+)\}", PAGE)[1]) == LRU_EPSILON
    assert same(find(r"sqrt\\varepsilon\)\$ = ([\d,]+)", PAGE)[1], 1 / (2 * LRU_EPSILON**0.5))
    assert 10 ** -int(find(r"mathrm\{mean\}\(x\^2\) \+ 10\^\{-(\d+)\}", PAGE)[1]) == RMSNorm.EPSILON
    assert int(find(r"output gate \$\\sigma\(W_g c\)\$ of rank (\d+)", PAGE)[1]) == GatedDeltaNet.GATE_RANK
    assert int(find(r"alpha_t = (-\d+)\$\. That", PAGE)[1]) == RESET_LOG_DECAY
    assert int(find(r"to date after every (\d+) tokens of a text", PAGE)[1]) == SPAN
    assert (
        float(find(r"counts of tokens: \$s\$; \$u\$; \$G\$, \$b\$ \| ([\d.]+); 1 / N; 0", PAGE)[1])
        == INITIAL_STRENGTH
    )
    chunk = int(find(r"Training reads (\d+) tokens at a time", PAGE)[1])
    for op in (chunked.rg_lru, chunked.gated_delta_rule):
        assert inspect.signature(op).parameters["chunk"].default == chunk


def test_weights_of_the_objective() -> None:
    weights = r"\$\\lambda = ([\d.]+)\$ and \$\\gamma = ([\d.]+)\$"
    written = [float(one) for one in find(rf"`quickstart` has {weights}, `tiny` {weights}", PAGE).groups()]
    settings = [content(config)["model"] for config in ("quickstart", "tiny")]
    portable = content("portable-tiny")["model"]
    assert portable | {"config": None} == settings[1] | {"config": None}
    assert written == [model[name] for model in settings for name in ("mtp_loss_weight", "confidence_penalty")]
    named = ("quickstart", "tiny", "portable-tiny")
    others = [content(name)["model"] for name in CONFIGS if "/" not in name and name not in named]
    assert not any({"mtp_loss_weight", "confidence_penalty"} & model.keys() for model in others)


def test_measurements_are_those_of_the_log() -> None:
    """Every loss that the departures quote stands in docs/experiments.md."""
    departures = page(PAGE).split("## Departures")
    losses = re.findall(r"\b\d\.\d{3}\b", " ".join(departures[1:]).replace("0.001..0.1", "").replace("0.999", ""))
    assert len(losses) >= 20
    log = page("docs/experiments.md")
    assert not [loss for loss in losses if loss not in log]
