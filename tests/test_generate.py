"""Generating: the same with and without a chunked prompt, and the draws are what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmrec.core.errors import UserError
from mmrec.inference import reading
from mmrec.inference.generate import default_prompt, generate_tokens
from mmrec.inference.reading import read_tokens
from mmrec.inference.sampling import SamplingOptions, sample_token
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import CharacterTokenizer, load_tokenizer

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)


def draw(logits: list[float], temperature: float = 1.0, **options: float) -> set[int]:
    rows = torch.tensor(logits).expand(2000, -1)
    sampling = SamplingOptions(temperature=temperature, **options)  # type: ignore[arg-type]
    return set(sample_token(rows, sampling, torch.Generator().manual_seed(0)).tolist())


def test_draws_stay_within_what_was_asked_for() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert draw(logits) == {0, 1, 2, 3}
    assert draw(logits, top_k=2) == {0, 1}
    assert draw(logits, top_p=0.75) == {0, 1}
    assert draw(logits, top_p=0.81) == {0, 1, 2}
    assert draw(logits, top_p=1e-9) == {0}
    assert draw(logits, temperature=0) == draw(logits, temperature=1e-320) == draw(logits, temperature=1e-7) == {0}
    assert draw(logits, temperature=1e-6) == {0}
    assert draw(logits, top_k=99) == {0, 1, 2, 3}


def test_draws_have_the_model_s_probabilities() -> None:
    rows = torch.tensor([0.7, 0.3]).log().expand(20_000, -1)
    random = torch.Generator().manual_seed(0)
    share = sample_token(rows, SamplingOptions(temperature=1.0), random).float().mean()
    assert share == pytest.approx(0.3, abs=0.01)
    cooler = sample_token(rows, SamplingOptions(temperature=0.5), random).float().mean()
    assert cooler == pytest.approx(0.09 / (0.09 + 0.49), abs=0.01)


def test_the_most_likely_text_is_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    net = RecurrentLM(SHAPE, 9).eval()
    prompt = torch.randint(9, (50,))
    tokens = list(generate_tokens(net, prompt, SamplingOptions(12, temperature=0)))
    everything = torch.cat([prompt, torch.tensor(tokens)])[None]
    logits, _ = net(everything, net.zero_state(1))
    assert logits[0, 49:-1].argmax(-1).tolist() == tokens

    whole, _ = read_tokens(net, prompt[None], net.zero_state(1))
    monkeypatch.setattr(reading, "READ_CHUNK", 7)
    parts, _ = read_tokens(net, prompt[None], net.zero_state(1))
    torch.testing.assert_close(parts, whole)


def test_a_text_without_a_prompt_begins_with_a_symbol_that_the_model_knows() -> None:
    for alphabet, expected in (("ab \n", "\n"), ("ab ", " "), ("ba", "a"), ("çé日", "ç")):
        tokenizer = CharacterTokenizer(alphabet)
        assert default_prompt(tokenizer) == expected
        assert len(tokenizer.encode(expected)) == 1
    assert default_prompt(load_tokenizer({"name": "bytes"})) == "\n"


def test_the_seed_decides() -> None:
    net = RecurrentLM(SHAPE, 9).eval()

    def drawn(seed: int) -> list[int]:
        return list(generate_tokens(net, torch.tensor([1]), SamplingOptions(30, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(-(2**63)) != drawn(2**64 - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name} is "):
        SamplingOptions(**wrong)
