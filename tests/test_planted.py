"""Phrases planted into text: what is scored where they come back, and what of the possible gain is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command

from mmrec.core.errors import UserError
from mmrec.evals.planted import PlantedOptions, gains, nll_on_return
from mmrec.evals.retention import retention
from mmrec.model import GatedDeltaNet, ModelConfig, RecurrentLM
from mmrec.model.ops import reference

CONFIG = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=16)
OPTIONS = PlantedOptions(distances=(8, 9, 40), phrase=8, cue=2, rows=3, lead=5)
TEXT = np.random.default_rng(0).integers(11, size=400).astype(np.uint16)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_phrase_is_scored_where_it_comes_back(shuffled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain model, which reads each row in one go."""
    monkeypatch.setattr("mmrec.evals.planted.CHUNK", 7)
    net = RecurrentLM(CONFIG, 11).eval()
    planted = OPTIONS.plant(TEXT, shuffled)
    known, unknown = nll_on_return(net, planted, OPTIONS.lead, OPTIONS.distances)
    assert known.shape == unknown.shape == (3, 3, 7)
    for number, distance in enumerate(OPTIONS.distances):
        for first, found in ((planted.phrases, known), (planted.others, unknown)):
            between = planted.text[:, OPTIONS.lead : OPTIONS.lead + distance - 8]
            row = torch.cat([planted.text[:, : OPTIONS.lead], first, between, planted.phrases], dim=1)
            assert row.shape[1] == OPTIONS.lead + distance + 8
            with torch.no_grad():
                logits, _ = net(row[:, :-1], net.zero_state(3))
            expected = torch.nn.functional.cross_entropy(logits.mT, row[:, 1:], reduction="none")[:, -7:]
            torch.testing.assert_close(found[number], expected.double(), atol=1e-5, rtol=1e-4)


def test_phrases_are_of_what_their_row_does_not_read() -> None:
    for seed in range(20):
        options = replace(OPTIONS, seed=seed)
        planted = options.plant(np.arange(400, dtype=np.uint16), False)
        for row, phrase, other in zip(*planted, strict=True):
            assert not set(row.tolist()) & (set(phrase.tolist()) | set(other.tolist()))
            assert phrase.diff().remainder(400).tolist() == 7 * [1]
        again = options.plant(np.arange(400, dtype=np.uint16), False)
        assert all(torch.equal(a, b) for a, b in zip(planted, again, strict=True))


def test_shuffling_keeps_the_tokens_of_a_phrase() -> None:
    plain, shuffled = (OPTIONS.plant(np.arange(400, dtype=np.uint16), which) for which in (False, True))
    assert torch.equal(plain.text, shuffled.text)
    assert torch.equal(plain.phrases, shuffled.phrases.sort(1).values)
    assert not torch.equal(plain.phrases, shuffled.phrases)


def test_a_model_without_a_memory_gains_nothing() -> None:
    net = RecurrentLM(replace(CONFIG, layer_types=("short",), conv_width=1), 11).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.get_parameter("memory.output.weight").zero_()
    known, unknown = nll_on_return(net, OPTIONS.plant(TEXT, True), OPTIONS.lead, OPTIONS.distances)
    assert gains(known, unknown)["share"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_share_is_of_what_is_possible() -> None:
    unknown = torch.tensor([[[1.0, 2.0], [2.0, 3.0]]], dtype=torch.float64)
    assert gains(torch.zeros_like(unknown), unknown) == {
        "possible": [4.0],
        "gained": [4.0],
        "share": [1.0],
        "error": [0.0],
    }
    found = gains(unknown - torch.tensor([[[0.5], [1.0]]]), unknown)  # of 3 and 5 nats, 1 and 2 are gained
    assert found["share"] == pytest.approx([3 / 8])
    # What is left beside the share of each: 1 - 9/8 and 2 - 15/8, an eighth either way.
    assert found["error"] == pytest.approx([2**0.5 / 8 / 4 / 2**0.5])


@pytest.mark.parametrize("negative", [False, True])
def test_what_is_left_of_an_association_is_what_the_recurrence_leaves(negative: bool) -> None:
    """Against the plain recurrence, in which the first token alone writes a value, read by its own key."""
    config = replace(CONFIG, layer_types=("long",), layers=1, negative_eigenvalues=negative)
    net, tokens = RecurrentLM(config, 11).eval(), torch.randint(11, (21,))
    found = retention(net, tokens, [7, 20])
    layer = net.recurrent_layers()[0]
    assert isinstance(layer, GatedDeltaNet)
    with torch.no_grad():
        block = net.blocks[0]
        x = block.get_submodule("memory_norm")(net.embedding(tokens[None]))
        qkv, _ = layer.conv(layer.split(layer.project(x)).qkv, net.zero_state(1)[0][0])
        _, keys, values = layer.heads_of(qkv, torch.float32)
        gates = layer.gates(x)
        beta = layer.beta_max * gates.activations["write"].mT
        values[:, :, 1:] = 0
        inputs = (keys, keys, values, gates.log_decay.mT, beta)
        _, state = reference.gated_delta_rule(*inputs, torch.zeros(1, 2, 8, 8))
    read = torch.einsum("hkv,hk->hv", state[0], keys[0, :, 0])
    left = (read / (beta[0, :, :1] * values[0, :, 0])).mean(1)
    for head in range(2):
        assert found[f"0.{head}"]["left"][1] == pytest.approx(float(left[head]), abs=1e-4)
        decayed = float(gates.log_decay[0, 1:, head].sum().exp())
        assert found[f"0.{head}"]["left_by_decay"][1] == pytest.approx(decayed, rel=1e-4)
    assert all(1 <= head["keys"] <= 8 for head in found.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing")
def test_planted_of_a_checkpoint(
    mmrec: Command, small_root: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--root={small_root}", f"--data_dir={prepared}"]
    short = ["--distances=[64,32]", "--phrase=16", "--cue=4", "--rows=4", "--lead=16"]
    assert mmrec("eval", "planted", *options, *short) == 0
    assert "4 phrases of 16 tokens, scored from their token 5 on" in capsys.readouterr().out
    found = json.loads(Path("eval/planted.json").read_text())
    assert found["distances"] == [32, 64]
    assert found["retention"]["distances"] == [1, 16, 64, 256, 1024]
    assert found["retention"]["heads"]
    assert all(len(values) == 2 for kind in ("text", "shuffled") for values in found["kinds"][kind].values())
    assert Path("eval/planted.png").read_bytes().startswith(b"\x89PNG")
    assert mmrec("eval", "planted", *options, "--distances=[1000000]") == 2
    error = capsys.readouterr().err
    assert "need more than 1,000,256" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cue": 32}, "below --phrase"),
        ({"cue": 0}, "at least 1"),
        ({"distances": (31,)}, "at least --phrase"),
        ({"distances": ()}, "at least --phrase"),
        ({"rows": 1}, "at least 2"),
        ({"lead": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PlantedOptions(**wrong)  # type: ignore[arg-type]
