"""The state that training carries: that of every row is what it has read itself, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command
from helpers import fit, last

from mmrec.checkpoints.loading import load_model
from mmrec.data.batches import SegmentSampler
from mmrec.data.store import open_tokens
from mmrec.model import reset_state_rows


@pytest.mark.parametrize("interleave", [1, 3])
def test_each_stream_goes_on_with_its_own_state(interleave: int, mmrec: Command, prepared: Path) -> None:
    rows = {"batch_size": 2, "seq_len": 20, "segment_len": 60, "interleave": interleave}
    options = [f"--data.{name}={value}" for name, value in rows.items()]
    frozen = ["--model.learning_rate=0", "--model.dropout=0", "--trainer.max_steps=25", "--trainer.precision=32-true"]
    assert mmrec(*fit(prepared, *options, *frozen, "--run=a")) == 0
    # Weights that never change, and so every memory is a function of what its rows have read.
    stream = SegmentSampler(open_tokens(prepared).train, 2, 20, segment_len=60, interleave=interleave)
    net = load_model(Path("lightning_logs/a/checkpoints/last.ckpt")).net
    expected = {number: net.zero_state(2) for number in range(interleave)}
    with torch.inference_mode():
        for number in range(25):
            batch = stream.batch(number)
            _, expected[batch.stream] = net(batch.inputs, reset_state_rows(expected[batch.stream], batch.reset_mask))
    carried = last("a")["mmrec_progress"]["carried"]
    assert carried.keys() == expected.keys()
    for number, state in expected.items():
        for (past, memory), (kept_past, kept_memory) in zip(state, carried[number], strict=True):
            torch.testing.assert_close(past, kept_past)
            torch.testing.assert_close(memory, kept_memory)
