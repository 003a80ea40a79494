"""Texts that are generated together: a step reads a token of each; texts join and leave between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrec.inference.decoders import StateDecoder, make_decoder
from mmrec.model import RecurrentLM, State

MANY = 1 << 20
"""Steps that the decoder of a batch is for."""


@dataclass(eq=False)
class Row:
    """A text that is to be generated in a batch.

    Attributes:
        state: of this text, of one row; None once a batch has it.
    """

    state: State | None


class Batch:
    """A model that reads a token of each of some texts at a time. Used from one thread.

    On a CPU the logits of a text are the same to the bit whatever other texts there are.

    Args:
        net: the model, in evaluation mode.
    """

    def __init__(self, net: RecurrentLM) -> None:
        self._net = net
        self._rows: list[Row] = []
        self._decoders: dict[int, StateDecoder] = {}

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """Read ``tokens``, one of each of ``rows``: those that are new join, and those that are left out have left.

        Returns:
            The logits of the next ones [B, N], on the CPU, in a buffer that the next call may overwrite.
        """
        if self._rows != [*rows]:
            self._change([*rows])
        size = padded(len(rows))
        return self._decoders[size].step([*tokens, *[0] * (size - len(rows))])[: len(rows)].cpu()

    def _change(self, rows: list[Row]) -> None:
        """Make ``rows`` those of the batch."""
        sources: list[State] = [self._decoders[padded(len(self._rows))].state()] if self._rows else []
        places = {row: place for place, row in enumerate(self._rows)}
        for row in rows:
            if row not in places:
                assert row.state is not None, "the row has left"
                places[row] = sum(len(state[0][0]) for state in sources)
                sources.append(row.state)
                row.state = None
        self._rows, size = rows, padded(len(rows))
        chosen = [places[row] for row in rows]
        chosen += chosen[:1] * (size - len(rows))  # rows of no text, whose numbers nobody reads
        state: State = []
        for layers in zip(*sources, strict=True):
            pasts, memories = zip(*layers, strict=True)
            state.append((torch.cat(pasts)[chosen], torch.cat(memories)[chosen]))
        if size in self._decoders:
            self._decoders[size].set_state(state)
        else:
            self._decoders[size] = make_decoder(self._net, state, MANY)


def padded(rows: int) -> int:
    """Return the size, at least ``rows``, that so many are computed in: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    A decoder is kept for each size.
    """
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 2 and rows <= power * 3 // 4 else power
