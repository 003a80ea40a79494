"""torch.compile takes the whole model as one graph: what breaks it would cost a GPU its launches."""

from __future__ import annotations

import pytest
import torch

from mmrec.inference.metrics import token_nll
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.captured import StaticStep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler
def test_forward_and_backward_are_one_graph() -> None:
    net = RecurrentLM(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24), 7)
    tokens = torch.randint(7, (2, 70))
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[0, 5] = True

    def loss(net: RecurrentLM, reset_mask: torch.Tensor | None) -> torch.Tensor:
        hidden, _ = net.hidden(tokens, net.zero_state(2), reset_mask)
        return token_nll(net.head(hidden), tokens, "mean")

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
