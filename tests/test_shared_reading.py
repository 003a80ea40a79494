"""A validation text that several processes read together: every figure has the bits that one process finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import checkpoints, fit, losses
from processes import run, server
from torch import Tensor, distributed

from mmrec.checkpoints.loading import load_model
from mmrec.data import batches
from mmrec.data.batches import Batch, StatefulEvalLoader
from mmrec.data.store import open_tokens
from mmrec.inference.metrics import TextMetrics
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.ops.native import functions
from mmrec.training import exchange, shared_reading
from mmrec.training.losses import nll_in_parts
from mmrec.training.shared_reading import SharedReading, share_out

pytestmark = pytest.mark.skipif(not functions.is_built(), reason="there is no C compiler")

PROCESSES = 3
VOCABULARY = 11
BATCH = 16
TEXTS = (16 * 14 + 6, 16 * 2, 16 * 6 + 1)
"""Lengths: the last batch is short, whole, or of one token; the second has fewer batches than there are processes."""
PARTS = (None, None, 5)
"""Batches of each of them that are scored, in stretches of two; None for all."""


def _net(dtype: torch.dtype) -> RecurrentLM:
    torch.manual_seed(0)
    config = ModelConfig(dim=16, layers=4, layer_types=("short", "long"), heads=2, ffn_dim=24)
    net = RecurrentLM(config, VOCABULARY, dropout=0.5).eval().to(dtype)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.3)  # as after training: the state counts
    return net


def _text(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(VOCABULARY, size=length).astype(np.uint16)


def _loader(number: int) -> StatefulEvalLoader:
    return StatefulEvalLoader(_text(TEXTS[number]), BATCH, PARTS[number])


def _no_starts(batch: Batch) -> Tensor | None:
    return None


def _documents(batch: Batch) -> Tensor | None:
    return batch.inputs == 0


def _plain(
    net: RecurrentLM, loader: StatefulEvalLoader, starts: Callable[[Batch], Tensor | None], dtype: torch.dtype
) -> Tensor:
    """Read as one process does: with the state carried from batch to batch."""
    state, found = net.zero_state(1, dtype=dtype), []
    for batch in loader:
        state = net.zero_state(1, dtype=dtype) if batch.reset_mask else state
        hidden, state = net.hidden(batch.inputs, state, starts(batch))
        found.append(nll_in_parts(net, hidden, batch.targets))
    return torch.cat(found)


CASES = [(dtype, starts) for dtype in (torch.float32, torch.float64) for starts in (_no_starts, _documents)]


@torch.inference_mode()
def _read(rank: int, rendezvous: Path, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    shared_reading.ROUNDS, batches.STRETCH = 2, 2 * BATCH
    found = []
    for dtype, starts in CASES:
        group, net = exchange.begin(100), _net(dtype)
        for text in range(len(TEXTS)):
            loader = _loader(text)
            reading = SharedReading(net, loader, loader.scored, group, starts)
            found.append([reading.nll(number).tolist() for number in range(loader.scored)])
    results.put((rank, found))


def test_several_processes_find_the_bits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STRETCH", 2 * BATCH)
    context = server()
    results = context.Queue()
    processes = [context.Process(target=_read, args=(rank, tmp_path / "meet", results)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    everyone = [found for _, found in sorted(results.get(timeout=120) for _ in processes)]
    for process in processes:
        process.join()
    assert everyone[0] == everyone[1] == everyone[2]
    texts = [(dtype, starts, text) for dtype, starts in CASES for text in range(len(TEXTS))]
    with torch.inference_mode():
        for (dtype, starts, text), found in zip(texts, everyone[0], strict=True):
            expected = _plain(_net(dtype), _loader(text), starts, dtype)
            assert [len(each) for each in found[:-1]] == [BATCH] * (len(found) - 1)
            assert [nll for batch in found for nll in batch] == expected.tolist(), (dtype, starts, text)


def test_a_text_that_cannot_be_shared_is_read_by_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = StatefulEvalLoader(_text(100), BATCH)
    trainer: Any = SimpleNamespace(val_dataloaders=loader, sanity_checking=False, num_val_batches=[len(loader)])
    net = _net(torch.float32)
    assert share_out(trainer, net, _no_starts) is None  # no processes that share memory
    relay = SimpleNamespace(reserve=lambda counts: 0)
    group = SimpleNamespace(processes=2, rank=0, relay=lambda numbers: relay)
    monkeypatch.setattr(exchange, "_in_use", [group])
    assert share_out(trainer, net, _no_starts) is not None
    assert share_out(trainer, net.to(torch.bfloat16), _no_starts) is None
    trainer.val_dataloaders = [loader]
    assert share_out(trainer, net.float(), _no_starts) is None
    group.processes, trainer.val_dataloaders = 1, loader
    assert share_out(trainer, net, _no_starts) is None


TRAINING = [
    "--trainer.devices=2",
    "--trainer.strategy=cores",
    "--data.batch_size=4",
    "--trainer.max_epochs=-1",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.check_val_every_n_epoch=null",
    "--run=a",
]


@torch.inference_mode()
def _loss(checkpoint: Path, prepared: Path, batches: int | None = None) -> float:
    """Return the loss that one process finds, as a validation logs it."""
    trained, text = load_model(checkpoint), open_tokens(prepared).val
    state, score = trained.net.zero_state(1), TextMetrics()
    for number, batch in enumerate(StatefulEvalLoader(text, 4 * 230)):
        if number == batches:
            break
        hidden, state = trained.net.hidden(batch.inputs, state)
        nll = nll_in_parts(trained.net, hidden, batch.targets)
        score.update(nll, torch.ones(len(nll), 2))
    return float(score.compute()["loss"].float())


@pytest.mark.slow
@pytest.mark.parametrize("batches", [None, 1])
def test_a_training_validates_to_the_bits_of_one_process(prepared: Path, tmp_path: Path, batches: int | None) -> None:
    limit = [] if batches is None else [f"--trainer.limit_val_batches={batches}", "--trainer.num_sanity_val_steps=1"]
    run(tmp_path, *fit(prepared, *TRAINING, *limit))
    logged = losses("a", "val/loss", tmp_path)
    assert sorted(logged) == [1, 3]
    assert logged[3] == _loss(checkpoints("a", tmp_path) / "last.ckpt", prepared, batches)
    if batches is None:
        said = run(tmp_path, "validate", "--run=a", "--ckpt_path=last")
        assert f"{logged[3]:.4f} nats/token" in said


def _dies_while_it_reads() -> None:
    give = SharedReading._give

    def die(self: SharedReading, number: int, layer: int, state: Any) -> None:
        if self._group.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        give(self, number, layer, state)

    SharedReading._give = die  # type: ignore[method-assign]


@pytest.mark.slow
def test_one_that_is_killed_while_it_reads_ends_the_others(prepared: Path, tmp_path: Path) -> None:
    said = run(tmp_path, *fit(prepared, *TRAINING), status=2, prepare=_dies_while_it_reads)
    assert said.count("mmrec: error: another process of this training has ended") == 1
