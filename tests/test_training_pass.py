"""Blocks in training as one node of the graph, beside the model's own forward and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit, last
from torch import Tensor

from mmrec.model import ModelConfig, RecurrentLM, State
from mmrec.model.ops import dispatch
from mmrec.model.without_autograd.training_pass import TrainingPass, has_training_pass

pytestmark = pytest.mark.skipif(not dispatch.choose_native(), reason="no C compiler")
FORMS = [
    ModelConfig(dim=32, layers=4, layer_types=("short", "long"), heads=2, ffn_dim=40),
    ModelConfig(dim=32, layers=3, layer_types=("portable", "short"), heads=2, ffn_dim=40, tie_embeddings=False),
]
ROWS, LENGTH = 3, 40


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(config: ModelConfig, dropout: float) -> RecurrentLM:
    torch.manual_seed(0)
    net = RecurrentLM(config, 11, dropout)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def read(net: RecurrentLM, hidden: object, tokens: Tensor, state: State) -> tuple[Tensor, State, list[Tensor]]:
    """Return what ``hidden`` computes of two batches, and the gradients of both, with the same random numbers."""
    torch.manual_seed(1)
    net.zero_grad()
    found, after = hidden(tokens, state)  # type: ignore[operator]
    (net.logits(found).float().square().sum() / tokens.numel()).backward()
    again, after = hidden(tokens[:, :-1], [(past.detach(), memory.detach()) for past, memory in after])  # type: ignore[operator]
    (net.logits(again).float().square().sum() / tokens.numel()).backward()
    return again.x.detach(), after, [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("narrow", [False, True])
def test_it_computes_what_the_model_and_autograd_do(config: ModelConfig, dropout: float, narrow: bool) -> None:
    net = made(config, dropout)
    tokens = torch.randint(11, (ROWS, LENGTH))
    state = [(torch.randn_like(past), torch.randn_like(memory)) for past, memory in net.zero_state(ROWS)]
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        assert has_training_pass(net)
        expected, after, gradients = read(net, net.hidden, tokens, state)
        gradients = [each.clone() for each in gradients]
        found, found_after, found_gradients = read(net, TrainingPass(net).hidden, tokens, state)
    near = 1e-2 if narrow else 1e-5
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    torch.testing.assert_close(found_after, after, rtol=near, atol=near)
    for (name, _), one, other in zip(net.named_parameters(), found_gradients, gradients, strict=True):
        assert (one - other).norm() <= near * other.norm(), name


@pytest.mark.parametrize("config", FORMS)
def test_gradients_are_handed_out_in_the_memory_that_they_were_written_to(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **options: real(*given, **options).fill_(torch.nan))
    net = made(config, 0.0)
    trained, parameters = TrainingPass(net), [*net.blocks.parameters(), *net.norm.parameters()]

    def gradients(tokens: Tensor) -> list[Tensor]:
        net.zero_grad()
        trained.hidden(tokens, net.zero_state(ROWS))[0].x.square().sum().backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    tokens = torch.randint(11, (ROWS, LENGTH))
    first = gradients(tokens)
    kept = [each.clone() for each in first]
    assert len(first) == len(parameters)
    assert all(each.isfinite().all() for each in first)
    assert len({each.untyped_storage().data_ptr() for each in first}) == 1  # no copies by autograd
    assert not torch.equal(gradients(tokens.flip(0))[0], first[0])
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))
    trained.hidden(tokens, net.zero_state(ROWS))[0].x.square().sum().backward()  # added to those of the last
    both = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for one, other, added in zip(gradients(tokens.flip(0)), kept, both, strict=True):
        torch.testing.assert_close(added, one + other)


def test_gradients_of_a_batch_whose_buffers_hold_another_are_refused() -> None:
    net = made(FORMS[0], 0.0)
    trained, tokens = TrainingPass(net), torch.randint(11, (ROWS, LENGTH))
    first, _ = trained.hidden(tokens, net.zero_state(ROWS))
    trained.hidden(tokens, net.zero_state(ROWS))
    with pytest.raises(RuntimeError, match="hold another one"):
        first.x.sum().backward()


def test_a_copy_has_weights_and_buffers_of_its_own() -> None:
    net, tokens = made(FORMS[0], 0.0), torch.randint(11, (ROWS, LENGTH))
    trained = TrainingPass(net)
    before, _ = trained.hidden(tokens, net.zero_state(ROWS))
    copied, net_of_it = copy.deepcopy((trained, net))
    with torch.no_grad():
        for parameter in net_of_it.parameters():
            parameter.zero_()
    assert not copied.hidden(tokens, net.zero_state(ROWS))[0].x.any()
    again, _ = trained.hidden(tokens, net.zero_state(ROWS))
    assert torch.equal(again.x, before.x)


def test_models_that_it_does_not_know_are_left_to_the_graph() -> None:
    net = made(FORMS[0], 0.0)
    assert has_training_pass(net)
    net.set_activation_checkpointing(True)
    assert not has_training_pass(net)
    net.set_activation_checkpointing(False)
    net.blocks[0].register_forward_hook(lambda *given: None)
    assert not has_training_pass(net)
    assert not has_training_pass(made(FORMS[0], 0.0).double())


@pytest.mark.slow
def test_a_run_keeps_to_the_way_that_it_was_begun_with(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    def begun(run: str) -> bool:
        found: bool = last(run, tmp_path)["mmrec_progress"]["training_pass"]
        return found

    steps = ["--trainer.max_epochs=-1", "--trainer.max_steps"]
    assert mmrec(*fit(prepared, *steps, "1", "--run=new")) == 0
    assert begun("new")
    path = tmp_path / "lightning_logs" / "new" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["mmrec_progress"]["training_pass"]  # as earlier versions wrote it
    torch.save(checkpoint, path)
    assert mmrec(*fit(prepared, *steps, "2", "--run=new", "--ckpt_path=last")) == 0
    assert not begun("new")
