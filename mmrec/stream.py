"""The order in which training reads the tokens: rows that continue from batch to batch.

The text is a ring, cut into as many rows as there are batch rows on all processes. Batch by batch each row is
read on from where it stopped, so that a memory can be carried along it. Every token is predicted exactly once
an epoch. A batch is a pure function of its number: resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec.errors import UserError

IGNORE = -100
"""Target of a position that is not scored, as in ``torch.nn.functional.cross_entropy``."""


class Batch(NamedTuple):
    """B rows of T tokens.

    Attributes:
        inputs: [B, T], int64.
        targets: [B, T], int64: the token that follows each input, or :data:`IGNORE`.
        fresh: [B], bool: rows that start from the zero state instead of what was read before.
    """

    inputs: Tensor
    targets: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class RowStream:
    """Training batches by number.

    Args:
        tokens: [N], any integer dtype; may be memory-mapped.
        batch_size: rows on this process.
        seq_len: most tokens a row reads in one batch. All batches of an epoch are of this length or one less.
        seed: of the epochs' offsets and of the resets.
        reset_probability: chance that a row starts a batch from the zero state, so that the model also learns
            to start from nothing.
        rank: number of this process.
        world_size: number of processes; together they read ``batch_size * world_size`` rows.
    """

    tokens: np.ndarray
    batch_size: int
    seq_len: int
    seed: int = 0
    reset_probability: float = 0.1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        rows = self.batch_size * self.world_size
        if len(self.tokens) < max(self.seq_len, 1) + 1 or len(self.tokens) < 2 * rows:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens, too few for {rows} rows of sequences of "
                f"{self.seq_len}; give more text, or a smaller --data.seq_len or --data.batch_size"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        rows = self.batch_size * self.world_size
        longest = -(-len(self.tokens) // rows)
        return -(-longest // self.seq_len)

    def batch(self, number: int) -> Batch:
        """Return batch ``number``, counted from 0 over all epochs."""
        epoch, step = divmod(number, len(self))
        total, rows = len(self.tokens), self.batch_size * self.world_size
        # Each epoch cuts the ring elsewhere: the same text is met in other batches and after other pasts.
        offset = int(np.random.default_rng((self.seed, epoch)).integers(total))
        row = np.arange(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        start, end = row * total // rows, (row + 1) * total // rows
        # Steps of nearly equal length: a last step of few tokens would be a noisy update.
        longest = -(-total // rows)
        first, last = step * longest // len(self), (step + 1) * longest // len(self)
        position = start[:, None] + np.arange(first, last + 1)
        window = self.tokens[(position + offset) % total].astype(np.int64)
        targets = np.where(position[:, 1:] <= end[:, None], window[:, 1:], IGNORE)
        random = np.random.default_rng((self.seed, epoch, step)).random(rows)[row]
        fresh = random < (1.0 if step == 0 else self.reset_probability)
        return Batch(torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(fresh))


class RowLoader:
    """Iterates over one epoch of a :class:`RowStream` at a time; sized, and resumable by an integer."""

    def __init__(self, stream: RowStream) -> None:
        self.stream = stream
        self.position = 0

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position
            self.position += 1  # before the batch leaves: a state taken while it is in use names the next one
            yield self.stream.batch(number)
            if (number + 1) % len(self.stream) == 0:
                return

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the batch that ``state`` names."""
        self.position = state["position"]


class TextLoader:
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
