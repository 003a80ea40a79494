"""The model: its state is all that it knows of the past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmrec.core.errors import UserError
from mmrec.model import (
    LAYER_TYPES,
    GatedDeltaNet,
    Gates,
    LayerState,
    ModelConfig,
    PortableGatedDeltaNet,
    RecurrentLayer,
    RecurrentLM,
    State,
    apply_reset,
    reset_state_rows,
)
from mmrec.model.decode import Decoder
from mmrec.model.ops import chunked, reference
from mmrec.model.statistics import layer_statistics

VOCABULARY = 11
SMALL = ModelConfig(dim=16, layers=3, layer_types=("short", "long"), heads=2, ffn_dim=24)


def model() -> RecurrentLM:
    return RecurrentLM(SMALL, VOCABULARY).double().eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def same_state(a: State, b: State) -> None:
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 2, 3, 32, 50, 69])
def test_reading_in_two_parts_is_reading_at_once(cut: int) -> None:
    net, x = model(), tokens(2, 70)
    whole, after = net(x, net.zero_state(2))
    first, between = net(x[:, :cut], net.zero_state(2))
    second, end = net(x[:, cut:], between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-9, atol=1e-11)
    same_state(end, after)


def test_token_by_token_with_the_plain_recurrences(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), tokens(2, 37)
    state = net.zero_state(2)
    state = [(torch.randn_like(past), torch.randn_like(memory)) for past, memory in state]
    expected, after = net(x, state)
    monkeypatch.setattr(chunked, "rg_lru", reference.rg_lru)
    monkeypatch.setattr(chunked, "gated_delta_rule", reference.gated_delta_rule)
    steps = []
    for t in range(37):
        logits, state = net(x[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-9, atol=1e-11)
    same_state(state, after)


def test_no_token_sees_a_later_one() -> None:
    net, x = model(), tokens(1, 40)
    before, _ = net(x, net.zero_state(1))
    x[0, 25:] = (x[0, 25:] + 1) % VOCABULARY
    after, _ = net(x, net.zero_state(1))
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_rows_are_independent_and_a_reset_row_starts_anew() -> None:
    net, x = model(), tokens(3, 20)
    _, state = net(tokens(3, 33), net.zero_state(3))
    logits, _ = net(x, reset_state_rows(state, torch.tensor([False, True, False])))
    reset_mask, _ = net(x[1:2], net.zero_state(1))
    torch.testing.assert_close(logits[1:2], reset_mask, rtol=1e-9, atol=1e-11)
    carried, _ = net(x[2:], [(past[2:], memory[2:]) for past, memory in state])
    torch.testing.assert_close(logits[2:], carried, rtol=1e-9, atol=1e-11)


def test_the_state_is_not_changed_by_reading() -> None:
    net = model()
    _, state = net(tokens(1, 10), net.zero_state(1))
    copy = [(past.clone(), memory.clone()) for past, memory in state]
    net(tokens(1, 10), state)
    same_state(state, copy)


def test_state_size_does_not_depend_on_the_text() -> None:
    net = model()
    for length in (1, 100):
        _, state = net(tokens(1, length), net.zero_state(1))
        assert sum(x.numel() for layer in state for x in layer) == net.state_size()


def test_the_state_keeps_nothing_else_in_memory() -> None:
    net = model()
    _, state = net(tokens(1, 500), net.zero_state(1))
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for layer in state for x in layer)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dim": 30, "heads": 4}, "multiple"),
        ({"layers": 0}, "at least 1"),
        ({"layer_types": ["shrot"]}, "did you mean 'short'"),
        ({"layer_types": []}, "empty"),
    ],
)
def test_a_wrong_config_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ModelConfig(**wrong)


def test_dropout_acts_in_training_only() -> None:
    net, x = RecurrentLM(SMALL, VOCABULARY, dropout=0.5), tokens(1, 12)
    state = net.zero_state(1)
    assert not torch.equal(net(x, state)[0], net(x, state)[0])
    net.eval()
    assert torch.equal(net(x, state)[0], net(x, state)[0])


def test_a_strength_of_two_turns_the_memory_around() -> None:
    """The eigenvalue of the memory's map along the key: 1 - strength, down to -1."""
    for negative, least in ((False, 0.0), (True, -1.0)):
        memory = GatedDeltaNet(dim=8, heads=1, conv_width=1, negative_eigenvalues=negative).double()
        assert memory.beta_bias is not None
        with torch.no_grad():
            memory.project.weight.zero_()
            memory.project.weight[8:16].copy_(torch.eye(8))  # the keys are the inputs, the values nothing
            memory.conv.weight.fill_(1)
            memory.beta_bias.fill_(50)
            memory.log_rate.fill_(-50)
        x = torch.zeros(1, 1, 8, dtype=torch.float64)
        x[0, 0, 0] = 1e3
        held = torch.eye(8, dtype=torch.float64)[None, None]
        _, (_, after) = memory(x, (memory.zero_state(1, x.device, x.dtype)[0], held))
        torch.testing.assert_close(after[0, 0].diag(), torch.tensor([least] + 7 * [1.0], dtype=torch.float64))


def test_every_parameter_is_trained() -> None:
    net, x = model(), tokens(2, 40)
    logits, _ = net(x, net.zero_state(2))
    logits.logsumexp(-1).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("layer_types", [["short"], ["long"], ["short", "long"]])
def test_a_fresh_token_forgets_all_before_it(layer_types: list[str]) -> None:
    """Documents read in one row, or each alone from the zero state: the same logits, gradients and last state."""
    net = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, layer_types=layer_types), 11).double()
    lengths = [1, 2, 40, 3, 64]
    tokens = torch.randint(11, (1, sum(lengths)))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    reset_mask = torch.zeros_like(tokens, dtype=torch.bool)
    reset_mask[:, starts] = True
    before = net(torch.randint(11, (1, 9)), net.zero_state(1))[1]

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(logits.sin().sum(), list(net.parameters())))

    together, last = net(tokens, before, reset_mask)
    alone = []
    for start, length in zip(starts, lengths, strict=True):
        logits, state = net(tokens[:, start : start + length], net.zero_state(1))
        alone.append(logits)
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(last, state, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(together), gradients(torch.cat(alone, dim=1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    # Carried on across calls: the bound may stand in another call than what it cuts off.
    first, state = net(tokens[:, :20], before, reset_mask[:, :20])
    second, _ = net(tokens[:, 20:], state, reset_mask[:, 20:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), together, rtol=1e-9, atol=1e-9)


class Ema(RecurrentLayer):
    """An exponential moving average of the inputs: a recurrent layer of one's own, without an op or a step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(dim))

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        size = len(self.logit)
        return torch.zeros(rows, 0, size, device=device, dtype=dtype), torch.zeros(
            rows, size, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        decay = apply_reset(self.gates(x).log_decay, reset_mask).exp()
        outputs, h = [], state[1]
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (1 - decay[:, t]) * x[:, t]
            outputs.append(h)
        return torch.stack(outputs, dim=1), (state[0], h)

    def gates(self, x: Tensor) -> Gates:
        decay = self.logit.sigmoid().expand_as(x)
        return Gates(decay.log(), {"decay": decay})


def test_a_layer_of_one_s_own_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_TYPES, "ema", lambda config: Ema(config.dim))
    net = RecurrentLM(ModelConfig(dim=16, layers=2, layer_types=("ema", "long"), heads=2, ffn_dim=8), VOCABULARY)
    x = tokens(1, 20)
    with torch.no_grad():
        logits, _ = net.eval()(x, net.zero_state(1))
    decoder = Decoder(net, net.zero_state(1))
    found = torch.stack([decoder.step([int(token)])[0].clone() for token in x[0]])
    torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-4)
    statistics = layer_statistics(net, x[0])[0]
    assert statistics.half_lives.tolist() == pytest.approx(16 * [1.0])
    assert statistics.gates == pytest.approx({"decay": 0.5})


def test_activation_checkpointing_keeps_little_and_changes_no_bit() -> None:
    net = RecurrentLM(SMALL, VOCABULARY, dropout=0.3)
    x, state = tokens(2, 64), net.zero_state(2)
    reset_mask = torch.rand(2, 64) < 0.1

    def measured(on: bool) -> tuple[list[Tensor], int]:
        net.set_activation_checkpointing(on)
        kept = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden, after = net.hidden(x, state, reset_mask)
        loss = hidden.x.square().sum() + after[1][1].sum()
        return [loss, *torch.autograd.grad(loss, list(net.parameters())[:-1])], kept

    expected, whole = measured(on=False)
    found, little = measured(on=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert little < whole / 5
    with torch.no_grad():
        net.eval()(x, state)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_a_portable_layer_is_its_equations(scale: float) -> None:
    """As docs/model.md writes them; with small inputs the epsilon of the norm shows, and so the scale of q."""
    heads, size, width, length = 2, 4, 3, 9
    layer = PortableGatedDeltaNet(heads * size, heads, width).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = scale * torch.randn(1, length, heads * size, dtype=torch.float64)
    found, (past, memory) = layer(x, layer.zero_state(1, x.device, x.dtype))
    with torch.no_grad():
        qkv, decay, beta, gate = (x[0] @ layer.project.weight.T).split(
            [3 * heads * size, heads, heads, heads * size], -1
        )
        padded = torch.cat([torch.zeros(width - 1, qkv.shape[1], dtype=x.dtype), qkv])
        kept = torch.zeros(heads, size, size, dtype=x.dtype)
        for t in range(length):
            mixed = nn.functional.silu((padded[t : t + width] * layer.conv.weight.T).sum(0)).view(3, heads, size)
            q = mixed[0] / (size * (mixed[0].square().sum(-1, keepdim=True) + 1e-6)).sqrt()
            k = mixed[1] / (mixed[1].square().sum(-1, keepdim=True) + 1e-6).sqrt()
            alpha = (-layer.log_rate.exp() * nn.functional.softplus(decay[t] + layer.decay_bias)).exp().view(-1, 1, 1)
            strength = beta[t].sigmoid().view(-1, 1)
            kept = alpha * kept
            held = torch.einsum("hkv,hk->hv", kept, k)
            kept = kept + torch.einsum("hk,hv->hkv", k, strength * (mixed[2] - held))
            o = torch.einsum("hkv,hk->hv", kept, q)
            o = layer.norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            y = layer.output.weight @ (o.flatten() * nn.functional.silu(gate[t]))
            torch.testing.assert_close(found[0, t], y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(memory[0], kept, rtol=1e-9, atol=1e-11)
    assert torch.equal(past[0], qkv[-(width - 1) :])
