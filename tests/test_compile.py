"""torch.compile takes the whole model as one graph: what breaks it would cost a GPU its launches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit, losses

from mmrec.inference.metrics import token_nll
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.captured import StaticStep
from mmrec.model.ops.native.build import SWITCH


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler
@pytest.mark.parametrize("half_lives", [(), (20, 300)])
def test_forward_and_backward_are_one_graph(half_lives: tuple[float, ...]) -> None:
    net = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, count_half_lives=half_lives), 7)
    tokens = torch.randint(7, (2, 70))
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[0, 5] = True

    def loss(net: RecurrentLM, reset_mask: torch.Tensor | None) -> torch.Tensor:
        hidden, _ = net.hidden(tokens, net.zero_state(2), reset_mask)
        return token_nll(net.logits(hidden), tokens, "mean")

    def gradients(compute: object, reset_mask: torch.Tensor | None) -> list[torch.Tensor]:
        assert callable(compute)
        value = compute(net, reset_mask)
        return [value.detach(), *torch.autograd.grad(value, list(net.parameters()))]

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for mask in (None, reset):
        for ours, theirs in zip(gradients(loss, mask), gradients(compiled, mask), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler
def test_a_step_of_generating_is_one_graph_and_stays_in_its_buffers() -> None:
    net = RecurrentLM(ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24), 7).eval()
    step = StaticStep(net, 3)
    assert not step.is_captured
    buffers = [step.tokens, step.logits, *(part for layer in step.state for part in layer)]
    addresses = [buffer.data_ptr() for buffer in buffers]
    state, tokens = net.zero_state(3), torch.randint(7, (3, 4))
    with torch.inference_mode():
        compiled = torch.compile(step.compute, fullgraph=True, backend="eager")
        for column in tokens.T:
            step.tokens.copy_(column[:, None])
            compiled()
            logits, state = net(column[:, None], state)
            torch.testing.assert_close(step.logits, logits[:, 0])
    torch.testing.assert_close(step.state, state)
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    assert buffers[1] is step.logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler
def test_a_training_can_be_compiled_and_resumed(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for a GPU; what makes kernels of the graph is left out, which would take minutes here."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=count))
    monkeypatch.setenv(SWITCH, "0")
    exact = ["--trainer.precision=32-true", "--trainer.max_epochs=-1"]
    assert mmrec(*fit(prepared, "--run=plain", *exact, "--trainer.max_steps=6")) == 0
    assert not graphs
    compiled = [*exact, "--run=compiled", "--model.compile=true"]
    assert mmrec(*fit(prepared, *compiled, "--trainer.max_steps=3")) == 0
    assert mmrec(*fit(prepared, *compiled, "--trainer.max_steps=6", "--ckpt_path=last")) == 0
    assert graphs
    ours, theirs = (losses(run) for run in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():  # Muon and AdamW make much of rounding
        assert ours[step] == pytest.approx(loss, rel=1e-6 if step == min(theirs) else 1e-3), step
