"""Decayed counts of tokens: against sums over all that was read, in any parts, with resets, and in memories."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmrec.checkpoints.checksummed import read_checksummed
from mmrec.checkpoints.state_file import FORMAT, SavedState, load_memory, save_memory
from mmrec.core.errors import UserError
from mmrec.inference.reading import Reader
from mmrec.model import ModelConfig, RecurrentLM, State
from mmrec.model.token_counts import SPAN, TokenCounts
from mmrec.training.losses import nll_in_parts, summed_losses

N = 40
CONFIG = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, count_half_lives=(10, 300.5))


def counting(config: ModelConfig = CONFIG, tokens: int = N) -> RecurrentLM:
    """A model whose every number is something else than at the start."""
    torch.manual_seed(0)
    net = RecurrentLM(config, tokens).eval()
    assert net.counts is not None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def said(counts: TokenCounts, hidden: Tensor, tokens: Tensor, resets: Tensor) -> Tensor:
    """What is added to the logits [T, N] of a text that is read from its begin, written plainly."""
    rows = []
    for place in range(len(tokens)):
        begin = max([0, *(reset for reset in resets.nonzero().flatten().tolist() if reset <= place)])
        end = place // SPAN * SPAN
        row = torch.zeros(N)
        gates = 2 * torch.sigmoid(hidden[place] @ counts.gate.weight.T + counts.gate.bias)
        for number, half_life in enumerate(counts.half_lives):
            count = torch.zeros(N)
            for read in range(begin, end):
                count[tokens[read]] += 0.5 ** ((end - 1 - read) / half_life)
            frequency = counts.log_frequency.exp()
            ratio = torch.log(count / (half_life * frequency) + 1) - math.log(float(count.sum()) / half_life + 1)
            row = row + gates[number] * counts.strength[number] * ratio
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, SPAN - 1, SPAN, 3 * SPAN, 3 * SPAN + 5])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_they_are_the_sums_over_what_was_read_and_so_are_their_gradients(length: int, share: float) -> None:
    net, hidden = counting(), torch.randn(2, length, 16, requires_grad=True)
    counts = net.counts
    assert counts is not None
    tokens, resets = torch.randint(N, (2, length)), torch.rand(2, length) < share
    wanted = torch.stack([said(counts, *each) for each in zip(hidden, tokens, resets, strict=True)])
    features, _ = counts.read(tokens, counts.zero_state(2, hidden.device), resets if share else None)
    found = counts.add(hidden.new_zeros(2, length, N), hidden, features)
    torch.testing.assert_close(found, wanted)
    weights, places = torch.randn_like(found), [hidden, *counts.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), places) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def read(net: RecurrentLM, tokens: Tensor, resets: Tensor | None, parts: list[int]) -> tuple[Tensor, State]:
    state, logits, begin = net.zero_state(len(tokens)), [], 0
    for part in parts:
        place = slice(begin, begin + part)
        some, state = net(tokens[:, place], state, None if resets is None else resets[:, place])
        logits.append(some)
        begin += part
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("parts", [[1] * 130, [SPAN + 1, 96 - SPAN, 32, 1], [SPAN, 2, 96 - SPAN, SPAN]])
@pytest.mark.parametrize("has_resets", [False, True])
def test_parts_are_the_whole(parts: list[int], has_resets: bool) -> None:
    net, tokens = counting(), torch.randint(N, (3, 130))
    resets = torch.rand(3, 130) < 0.04 if has_resets else None
    with torch.no_grad():
        (whole, after), (found, state) = (read(net, tokens, resets, each) for each in ([130], parts))
    torch.testing.assert_close(found, whole, atol=5e-5, rtol=1e-5)  # products of other sizes round differently
    for a, b in zip(state[-1], after[-1], strict=True):
        assert torch.equal(a, b)  # to the bit: what was counted does not depend on where a text was cut


def test_rows_may_be_at_other_places_of_a_span() -> None:
    net, tokens = counting(), torch.randint(N, (3, 90))
    with torch.no_grad():
        alone = [net(tokens[row : row + 1, :begun], net.zero_state(1))[1] for row, begun in enumerate((7, SPAN, 60))]
        joined = [tuple(map(torch.cat, zip(*layers, strict=True))) for layers in zip(*alone, strict=True)]
        found, _ = net(tokens[:, 60:], joined)
        for row, state in enumerate(alone):
            torch.testing.assert_close(found[row : row + 1], net(tokens[row : row + 1, 60:], state)[0])


def test_a_token_that_was_read_is_expected_again() -> None:
    net = RecurrentLM(CONFIG, N).eval()
    with torch.no_grad():
        _, before = net(torch.full((1, 2 * SPAN), 7), net.zero_state(1))
        logits, _ = net(torch.tensor([[3]]), before)
        plain, _ = net(torch.tensor([[3]]), [*before[:-1], net.zero_state(1)[-1]])
    gain = (logits.log_softmax(-1) - plain.log_softmax(-1))[0, 0]
    assert gain[7] > 1
    assert (gain[torch.arange(N) != 7] < 0).all()


def test_logits_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens, targets = counting(), torch.randint(N, (2, 5 * SPAN + 3)), torch.randint(N, (2, 5 * SPAN + 3))
    with torch.no_grad():
        _, state = net(tokens[:, :11], net.zero_state(2))

    def found() -> list[Tensor]:
        hidden, _ = net.hidden(tokens, state)
        losses = summed_losses(net, hidden, targets, penalized=True)
        return [
            *losses,
            nll_in_parts(net, hidden, targets),
            *torch.autograd.grad(losses[0] + losses[1], [*net.parameters()]),
        ]

    whole = found()
    monkeypatch.setattr("mmrec.training.losses.MOST_LOGITS", 4 * SPAN * N)
    for a, b in zip(whole, found(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_memory_keeps_them_and_a_model_that_learns_has_them(tmp_path: Path) -> None:
    """Read in two commands, with a file between them, is read at once, to the bit, with what was learned."""
    net, text, memories = counting(tokens=256), torch.randint(97, 123, (300,)), []
    for parts in ([300], [45, 255]):
        memory, file = SavedState.empty(net).learning(net), tmp_path / "memory"
        for part in text.split(parts):
            reader = Reader(net, memory)
            assert all(each.nll.isfinite().all() for each in reader.read(part))
            save_memory(file, reader.memory, "model")
            memory = load_memory(file, net, "model")
        memories.append(read_checksummed(file, FORMAT)[0])
    assert memories[0].keys() == memories[1].keys()
    assert all(torch.equal(memories[0][name], memories[1][name]) for name in memories[0])
    assert "2.memory" in memories[0]
    assert memories[0]["learned.difference.counts.strength"].any()


@pytest.mark.parametrize("wrong", [[0.5], [math.inf], [math.nan], [True], ["many"], [-3]])
def test_half_lives_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(UserError, match="count_half_lives"):
        ModelConfig(count_half_lives=wrong)
