"""Batches for truncated backpropagation through time (TBPTT): rows whose recurrent state is carried between batches.

The token sequence is a ring, cut into segments. Each row of a batch reads one segment over several batches, so that
its state can be carried, and then goes on with another segment, drawn at random: the rows of one batch are from all
over the text. Several interleaved streams, each with rows and carried states of its own, may take turns, so that
consecutive updates see different places. Every token is predicted exactly once an epoch. A batch is a pure function
of its number: resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec.core.errors import UserError

IGNORE_INDEX = -100
"""Target of a position that is not scored: the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``."""


STRETCH = 2048
"""Tokens of a stretch of a text that is scored in part; the state of a new one is as good as any after a fraction."""


class Batch(NamedTuple):
    """B rows of T tokens.

    Attributes:
        inputs: [B, T], int64.
        targets: [B, T], int64: the token that follows each input, or :data:`IGNORE_INDEX`.
        reset_mask: [B], bool: rows that start from the zero state instead of the carried one.
        stream: number of the interleaved stream: the carried states are those that its last batch left.
    """

    inputs: Tensor
    targets: Tensor
    reset_mask: Tensor
    stream: int = 0


@dataclass(frozen=True)
class SegmentSampler:
    """Training batches by number, for truncated BPTT with a state that is carried along segments.

    Args:
        tokens: [N], any integer dtype; may be memory-mapped.
        batch_size: rows on this process.
        seq_len: most tokens of a row in one batch, which the gradient reaches back over. A segment is read in as few
            batches as that takes, and their lengths differ by one token at most: one of 83 tokens, with 50, in
            batches of 41 and 42.
        seed: of the epochs' offsets and orders.
        segment_len: most tokens of a segment, over which the state is carried; at least ``seq_len``.
        reset_probability: probability that a row starts a segment from the zero state, so that the model also learns
            to begin without a context.
        interleave: number of interleaved streams.
        rank: number of this process.
        world_size: number of processes; together they read ``batch_size * world_size`` rows.
        text: tells the text apart from others, in what is resumed.
    """

    tokens: np.ndarray
    batch_size: int
    seq_len: int
    seed: int = 0
    segment_len: int = 2048
    reset_probability: float = 0.5
    interleave: int = 1
    rank: int = 0
    world_size: int = 1
    text: str = ""
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = self.rows
        if len(self.tokens) < max(self.seq_len, 1) + 1 or len(self.tokens) < 2 * rows:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens, too few for {rows} rows of sequences of "
                f"{self.seq_len}; give more text, or a smaller --data.seq_len or --data.batch_size"
            )

    @property
    def rows(self) -> int:
        """Rows on all processes."""
        return self.batch_size * self.world_size

    @property
    def segments(self) -> int:
        """Segments of the text; a multiple of :attr:`rows`. Their lengths differ by one token at most."""
        return self.rows * -(-len(self.tokens) // (self.rows * max(self.segment_len, self.seq_len)))

    @property
    def _longest(self) -> int:
        return -(-len(self.tokens) // self.segments)

    @property
    def _segment_batches(self) -> int:
        return -(-self._longest // self.seq_len)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.segments // self.rows * self._segment_batches

    def _order(self, epoch: int) -> np.ndarray:
        """Return the segments in the order of ``epoch``; only the latest order asked for is kept."""
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng((self.seed, epoch, 1)).permutation(self.segments)
        return self._orders[epoch]

    def batch(self, number: int) -> Batch:
        """Return batch ``number``, counted from 0 over all epochs."""
        epoch, step = divmod(number, len(self))
        # Each stream reads one segment a row; in the last turn of an epoch there may be fewer streams.
        first = step // (self.interleave * self._segment_batches) * self.interleave
        streams = min(self.interleave, self.segments // self.rows - first)
        step, stream = divmod(step - first * self._segment_batches, streams)
        turn = first + stream
        total, count = len(self.tokens), self.segments
        # Each epoch cuts the ring elsewhere: the same text is met in other batches and after other pasts.
        offset = int(np.random.default_rng((self.seed, epoch)).integers(total))
        row = np.arange(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        segment = self._order(epoch)[turn * self.rows + row]
        start, end = segment * total // count, (segment + 1) * total // count
        # Steps of nearly equal length: a last step of few tokens would be a noisy update.
        first = step * self._longest // self._segment_batches
        last = (step + 1) * self._longest // self._segment_batches
        position = start[:, None] + np.arange(first, last + 1)
        window = self.tokens[(position + offset) % total].astype(np.int64)
        targets = np.where(position[:, 1:] <= end[:, None], window[:, 1:], IGNORE_INDEX)
        random = np.random.default_rng((self.seed, epoch, 2, turn)).random(self.rows)[row]
        reset_mask = (random < self.reset_probability) & (step == 0)
        inputs = torch.from_numpy(window[:, :-1].copy())
        return Batch(inputs, torch.from_numpy(targets), torch.from_numpy(reset_mask), stream)

    def identity(self) -> dict[str, Any]:
        """Return what decides which tokens a batch holds: the same on every process, and however many there are."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "rows": self.rows,
            "seq_len": self.seq_len,
            "segment_len": self.segment_len,
            "seed": self.seed,
            "interleave": self.interleave,
        }


class TrainLoader:
    """Stateful loader over the batches of a :class:`SegmentSampler`, as many as an epoch has; resumed by an integer.

    Each iteration goes on where the one before ended, wherever that is: an epoch of the trainer may be shorter
    (``limit_train_batches``), and does not end where one of the text does.

    Args:
        sampler: gives the batches by number.
        repeat: number of first batches that are read again and again (overfitting on them); the whole text if None.
    """

    def __init__(self, sampler: SegmentSampler, repeat: int | None = None) -> None:
        self.segments = sampler  # not "sampler": Lightning would take it for one that shuffles, and replace it
        self.repeat = repeat
        self.position = 0

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            number = self.position
            self.position += 1  # before the batch leaves: a state taken while it is in use names the next one
            yield self.segments.batch(number % self.repeat if self.repeat else number)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch, and what that number depends on."""
        return {"position": self.position, "epoch_batches": len(self)} | self.segments.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch that ``state`` names.

        Rows may be shared out over another number of processes. Where anything else has changed, only the end of an
        epoch is a place to go on from: elsewhere text would be skipped or read twice.

        Raises:
            UserError: the position is within an epoch that was cut into other segments.
        """
        here = self.segments.identity()
        unknown: dict[str, Any] = {"interleave": 1, "text": self.segments.text}  # to older checkpoints
        state = unknown | state
        epoch, within = divmod(state["position"], state["epoch_batches"])
        changed = [f"{name} {state[name]} there, {here[name]} here" for name in here if state[name] != here[name]]
        if changed and within:
            raise UserError(
                f"the checkpoint stands within an epoch, and other segments would skip text or read it twice "
                f"({'; '.join(changed)}; rows are data.batch_size times the processes); keep them, or start a new run"
            )
        self.position = epoch * len(self) + within


class StatefulEvalLoader:
    """Stateful evaluation: reads a text once, in one row whose state is carried from batch to batch to its very end.

    The first token has no context and is not scored; every other token is, exactly once. Where only some batches are
    to be scored, they are stretches of at least :data:`STRETCH` tokens (the last may have fewer), spread evenly over
    the text: its begin alone can be quite unlike the rest. Each stretch is read from the zero state.

    Args:
        tokens: [T] of the text, at least 2.
        seq_len: tokens of a batch.
        scored: batches that are asked for; None for all. The length is that of the whole text, which Lightning takes
            its limit of.

    Raises:
        UserError: the text has fewer than 2 tokens.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, scored: int | None = None) -> None:
        if len(tokens) < 2:
            raise UserError(f"the text to evaluate has {len(tokens)} token(s); it needs at least 2")
        self.tokens = tokens
        self.seq_len = seq_len
        self.scored = len(self) if scored is None else min(scored, len(self))
        self._stretch = len(self) if self.scored == len(self) else -(-STRETCH // seq_len)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(self.scored))

    def begins(self, number: int) -> bool:
        """Return whether the state is reset before batch ``number``."""
        return number % self._stretch == 0

    def targets(self, number: int) -> int:
        """Return how many tokens batch ``number`` scores."""
        return min(self.seq_len, len(self.tokens) - 1 - self._start(number))

    def batch(self, number: int) -> Batch:
        """Return batch ``number``, counted from 0."""
        start = self._start(number)
        window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))[None]
        return Batch(window[:, :-1], window[:, 1:], torch.tensor([self.begins(number)]))

    def _start(self, number: int) -> int:
        """Return the place in the text of the first token of batch ``number``."""
        # What is left out is shared out over the gaps between the stretches: the last one ends with the text.
        left_out = len(self.tokens) - 1 - self.scored * self.seq_len
        gaps = max(1, -(-self.scored // self._stretch) - 1)
        return number * self.seq_len + left_out * (number // self._stretch) // gaps


class WindowedEvalLoader:
    """Windowed evaluation: reads a text in windows that each start from the zero state, as nanoGPT evaluates.

    The context of a token is what precedes it in its window alone. As with :class:`StatefulEvalLoader`, every
    token but the first is scored exactly once; the last window is as long as the text allows.
    """

    def __init__(self, tokens: np.ndarray, window: int, rows: int) -> None:
        if len(tokens) < 2:
            raise UserError(f"the text to evaluate has {len(tokens)} token(s); it needs at least 2")
        self.tokens = tokens
        self.window = window
        self.rows = rows

    def __len__(self) -> int:
        full, rest = divmod(len(self.tokens) - 1, self.window)
        return -(-full // self.rows) + (rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        full, rest = divmod(len(self.tokens) - 1, self.window)
        for first in range(0, full, self.rows):
            yield self._windows(first * self.window, min(self.rows, full - first), self.window)
        if rest:
            yield self._windows(full * self.window, 1, rest)

    def _windows(self, start: int, rows: int, length: int) -> Batch:
        part = torch.from_numpy(self.tokens[start : start + rows * length + 1].astype(np.int64))
        return Batch(part[:-1].view(rows, length), part[1:].view(rows, length), torch.ones(rows, dtype=torch.bool))
