"""The order in which training reads the tokens: rows that continue from batch to batch.

The text is a ring, cut into segments. Each row of the batch reads a segment from batch to batch, so that a memory
can be carried along it, and then goes on with another one, chosen at random: what a moment of training sees is from
all over the text. Several groups of rows may be read in turn, so that one update after the other sees other places
while the memories of the rest wait. Every token is predicted exactly once an epoch. A batch is a pure function of its
number: resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec.core.errors import UserError

IGNORE = -100
"""Target of a position that is not scored, as in ``torch.nn.functional.cross_entropy``."""


class Batch(NamedTuple):
    """B rows of T tokens.

    Attributes:
        inputs: [B, T], int64.
        targets: [B, T], int64: the token that follows each input, or :data:`IGNORE`.
        reset_mask: [B], bool: rows that start from the zero state instead of what was read before.
        group: whose memories the rows go on with: those that the last batch of this group left.
    """

    inputs: Tensor
    targets: Tensor
    reset_mask: Tensor
    group: int = 0


@dataclass(frozen=True)
class SegmentSampler:
    """Training batches by number.

    Args:
        tokens: [N], any integer dtype; may be memory-mapped.
        batch_size: rows on this process.
        seq_len: most tokens a row reads in one batch. A segment is read in as few batches as that takes, and their
            lengths differ by one token at most: one of 83 tokens, with 50, in batches of 41 and 42.
        seed: of the epochs' offsets and orders.
        segment_len: most tokens that a row reads on before it goes elsewhere; at least ``seq_len`` counts.
        reset_probability: chance that a row starts a segment from the zero state, so that the model also learns
            to start from nothing.
        interleave: groups of rows that are read in turn.
        rank: number of this process.
        world_size: number of processes; together they read ``batch_size * world_size`` rows.
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
        # Each group reads one segment a row; the last groups of an epoch may be fewer.
        first = step // (self.interleave * self._segment_batches) * self.interleave
        groups = min(self.interleave, self.segments // self.rows - first)
        step, group = divmod(step - first * self._segment_batches, groups)
        turn = first + group
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
        targets = np.where(position[:, 1:] <= end[:, None], window[:, 1:], IGNORE)
        random = np.random.default_rng((self.seed, epoch, 2, turn)).random(self.rows)[row]
        reset_mask = (random < self.reset_probability) & (step == 0)
        inputs = torch.from_numpy(window[:, :-1].copy())
        return Batch(inputs, torch.from_numpy(targets), torch.from_numpy(reset_mask), group)

    def identity(self) -> dict[str, int]:
        """Return what decides which tokens a batch holds: the same on every process, and however many there are."""
        return {
            "tokens": len(self.tokens),
            "rows": self.rows,
            "seq_len": self.seq_len,
            "segment_len": self.segment_len,
            "seed": self.seed,
            "interleave": self.interleave,
        }


class TrainLoader:
    """Iterates over the batches of a :class:`SegmentSampler`, as many as an epoch has; resumable by an integer.

    Each iteration goes on where the one before was left, wherever that is: an epoch of the trainer may be shorter
    (``limit_train_batches``), and does not end where one of the text does.

    Args:
        stream: of the batches.
        repeat: number of batches, the first ones, that are read again and again; all of the text if None.
    """

    def __init__(self, stream: SegmentSampler, repeat: int | None = None) -> None:
        self.stream = stream
        self.repeat = repeat
        self.position = 0

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            number = self.position
            self.position += 1  # before the batch leaves: a state taken while it is in use names the next one
            yield self.stream.batch(number % self.repeat if self.repeat else number)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch, and what that number depends on."""
        return {"position": self.position, "epoch_batches": len(self)} | self.stream.identity()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the batch that ``state`` names.

        Rows may be shared out over another number of processes. Where anything else has changed, only the end of an
        epoch is a place to go on from: elsewhere text would be skipped or read twice.

        Raises:
            UserError: the place is within an epoch that was cut in another way.
        """
        state = {"interleave": 1} | state  # which older checkpoints do not know
        epoch, within = divmod(state["position"], state["epoch_batches"])
        here = self.stream.identity()
        changed = [f"{name} {state[name]} there, {here[name]} here" for name in here if state[name] != here[name]]
        if changed and within:
            raise UserError(
                f"the checkpoint stands within an epoch, and another cut would skip text or read it twice "
                f"({'; '.join(changed)}; rows are data.batch_size times the processes); keep them, or start a new run"
            )
        self.position = epoch * len(self) + within


class StatefulEvalLoader:
    """Reads a text once from its start, in one row whose state is carried: nothing left out at the end.

    The first token has nothing before it and is not scored; every other one is, exactly once.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        if len(tokens) < 2:
            raise UserError(f"the text to evaluate has {len(tokens)} token(s); it needs at least 2")
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.tokens) - 1, self.seq_len):
            window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))[None]
            yield Batch(window[:, :-1], window[:, 1:], torch.tensor([start == 0]))


class WindowedEvalLoader:
    """Reads a text in windows that each start from the zero state: nanoGPT's protocol.

    A token is predicted from what stands before it in its window alone. As with :class:`StatefulEvalLoader`, every
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
