"""Training on a token folder: batches for models with and without a state, and scores of the validation text."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmrec.baselines.training import (
    Hyperparameters,
    TrainingLoop,
    carries_state,
    detach,
    device_of,
    initial_state,
    mean_nll,
    reset_rows,
)
from mmrec.data.batches import SegmentSampler, StatefulEvalLoader, WindowedEvalLoader
from mmrec.data.store import TokenFolder

INTERLEAVE = 8
"""Streams that a model with a state reads interleaved."""
EVAL_SEQ_LEN, EVAL_ROWS = 2048, 32
"""Tokens of a chunk where the state is carried; windows of a batch where it is not."""


class TrainBatch(NamedTuple):
    """A batch, and the state that its rows go on from.

    Attributes:
        inputs: [B, T], int64.
        targets: [B, T], int64.
        state: of B rows.
        stream: whose state it is.
    """

    inputs: Tensor
    targets: Tensor
    state: Any
    stream: int


class Batches(Protocol):
    """Training batches of one model by number."""

    def batch(self, number: int) -> TrainBatch:
        """Return batch ``number``; numbers are asked for in order."""

    def keep(self, stream: int, state: Any) -> None:
        """Keep the state after a batch of ``stream``."""


class StreamBatches:
    """Batches of interleaved streams, each with its state carried: truncated backpropagation through time.

    Args:
        model: reads them.
        tokens: [N].
        hyperparameters: of their size.
        seed: of their order.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, hyperparameters: Hyperparameters, seed: int) -> None:
        self._model, self._rows = model, hyperparameters.batch_size
        self._sampler = SegmentSampler(tokens, self._rows, hyperparameters.seq_len, seed, interleave=INTERLEAVE)
        self._states: dict[int, Any] = {}

    def batch(self, number: int) -> TrainBatch:
        inputs, targets, reset_mask, stream = self._sampler.batch(number)
        inputs, targets, reset_mask = (part.to(device_of(self._model)) for part in (inputs, targets, reset_mask))
        state = self._states[stream] if stream in self._states else initial_state(self._model, self._rows)
        return TrainBatch(inputs, targets, reset_rows(self._model, state, reset_mask), stream)

    def keep(self, stream: int, state: Any) -> None:
        self._states[stream] = detach(state)


class RandomWindows:
    """Batches of windows at random places, each read from the initial state, as nanoGPT's.

    Args:
        model: reads them.
        tokens: [N], more than a window has.
        hyperparameters: of their size.
        seed: of their places.
    """

    def __init__(self, model: nn.Module, tokens: np.ndarray, hyperparameters: Hyperparameters, seed: int) -> None:
        self._model, self._tokens, self._random = model, tokens, np.random.default_rng(seed)
        self._rows, self._length = hyperparameters.batch_size, hyperparameters.seq_len

    def batch(self, number: int) -> TrainBatch:
        starts = self._random.integers(len(self._tokens) - self._length, size=self._rows)
        window = torch.from_numpy(self._tokens[starts[:, None] + np.arange(self._length + 1)].astype(np.int64))
        window = window.to(device_of(self._model))
        return TrainBatch(window[:, :-1], window[:, 1:], initial_state(self._model, self._rows), 0)

    def keep(self, stream: int, state: Any) -> None:
        """Keep nothing: the next windows begin anew."""


def make_batches(model: nn.Module, tokens: np.ndarray, hyperparameters: Hyperparameters, seed: int) -> Batches:
    """Return the batches that ``model`` is trained on: streams where it carries a state, else random windows."""
    kind = StreamBatches if carries_state(model) else RandomWindows
    return kind(model, tokens, hyperparameters, seed)


def train_step(loop: TrainingLoop, batches: Batches) -> None:
    """Make one update from the next batch."""
    inputs, targets, state, stream = batches.batch(loop.step)
    loss, state = loop.loss(inputs, targets, state)
    batches.keep(stream, state)
    loop.update(loss)


def validation_loss(model: nn.Module, data: TokenFolder, window: int) -> float:
    """Return the mean loss of the validation text in nats/token, in full precision.

    Args:
        model: scored with its state carried where it has one, else on windows.
        data: its validation text is read.
        window: tokens of a window.
    """
    carries = carries_state(model)
    loader: StatefulEvalLoader | WindowedEvalLoader
    loader = (
        StatefulEvalLoader(data.val, EVAL_SEQ_LEN) if carries else WindowedEvalLoader(data.val, window, EVAL_ROWS)
    )
    model.eval()
    total, state = 0.0, initial_state(model, 1)
    with torch.inference_mode():
        for inputs, targets, *_ in loader:
            before = state if carries else initial_state(model, len(inputs))
            loss, state = mean_nll(model, inputs.to(device_of(model)), targets.to(device_of(model)), before)
            total += float(loss) * targets.numel()
    model.train()
    return total / (len(data.val) - 1)
