"""Reading rows with padding: padding never reaches the state, and is never read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrec.model import Hidden, RecurrentLM, State
from mmrec.model.token_counts import SPAN

READ_CHUNK = 2048
"""Tokens that are read at once."""


@dataclass
class Outputs:
    """The hidden states of some of the last positions.

    Attributes:
        hidden: [B, at most ``keep``, D], what the logits are computed from; of a model that counts tokens [B, any,
            D + N], with what the counts add to the logits behind it.
        streams: the residual stream before each block, of the same form; empty unless it was asked for.
        state: after the last token.
    """

    hidden: Tensor
    streams: list[Tensor]
    state: State


@dataclass
class Reader:
    """Reads rows of tokens, or of embeddings, in chunks: the memory that it takes does not grow with the text.

    Args:
        net: the model.
        keep: how many last positions to return.
        with_streams: return the residual streams, too.
    """

    net: RecurrentLM
    keep: int
    with_streams: bool = False
    chunk: int = field(default_factory=lambda: READ_CHUNK)

    def read(self, inputs: Tensor, state: State, reset_mask: Tensor | None = None) -> Outputs:
        """Read rows without padding.

        Args:
            inputs: tokens [B, T] or embeddings [B, T, D], T at least 1.
            state: of the B rows, before the first token.
            reset_mask: [B, T], bool: tokens before which the state is set to zero.
        """
        hidden: list[Tensor] = []
        streams: list[list[Tensor]] = []
        length = inputs.shape[1]
        for begin in range(0, length, self.chunk):
            part = slice(begin, begin + self.chunk)
            x = inputs[:, part]
            x = self.net.embedding(x) if x.dim() == 2 else x
            mask = None if reset_mask is None or not bool(reset_mask[:, part].any()) else reset_mask[:, part]
            taps: list[Tensor] | None = [] if self.with_streams else None
            outputs, after = self.net.hidden_from_embeddings(x, state[: len(self.net.blocks)], mask, taps)
            found, state = self.net.with_counts(outputs, after, inputs[:, part], state, mask)
            first = max(0, length - self.keep - begin)
            if first < outputs.shape[1]:
                hidden.append(self._from(first, found))
                streams.append([tap[:, first:] for tap in taps or []])
        return Outputs(torch.cat(hidden, dim=1), [torch.cat(one, dim=1) for one in zip(*streams, strict=True)], state)

    def _from(self, first: int, found: Hidden) -> Tensor:
        """Return what the logits of the positions from ``first`` on are computed from."""
        if self.net.counts is None or found.counted is None:
            return found.x[:, first:]
        begin = first - first % SPAN
        x, counted = found.narrow(begin, found.x.shape[1] - begin)
        assert counted is not None
        return torch.cat([x, self.net.counts.added(x, counted)], -1)[:, first - begin :]

    def read_first(self, inputs: Tensor, real: Tensor, state: State, reset_mask: Tensor | None) -> Outputs:
        """Read rows with padding from their beginning: ``state`` is zero.

        All padding is put before the tokens of its row, and the state is set to zero at the first of these.

        Args:
            inputs: as for :meth:`read`.
            real: [B, T], bool: false at padding.
            state: zero.
            reset_mask: as for :meth:`read`.
        """
        order = real.int().argsort(dim=1, stable=True)
        first = (~real).sum(1, keepdim=True)
        resets = torch.arange(real.shape[1], device=real.device) == first
        if reset_mask is not None:
            resets = resets | (reset_mask & real).gather(1, order)
        read = self.read(_gather(inputs, order), state, resets)
        kept = read.hidden.shape[1]
        # Padding behind a token has that token's outputs, and padding before all tokens has zeros.
        place = (first + real.cumsum(1) - 1 - (real.shape[1] - kept))[:, -kept:]
        begun = real.cumsum(1)[:, -kept:] > 0
        hidden, *streams = (
            _gather(x, place.clamp(0, kept - 1)).masked_fill(~begun.unsqueeze(-1), 0)
            for x in (read.hidden, *read.streams)
        )
        keep = real.any(1)  # a row of padding alone keeps the zero state
        blank = [(torch.zeros_like(past), torch.zeros_like(memory)) for past, memory in read.state]
        return Outputs(hidden, streams, [_where(keep, *pair) for pair in zip(read.state, blank, strict=True)])

    def read_on(
        self, inputs: Tensor, real: Tensor, state: State, before: Tensor, reset_mask: Tensor | None
    ) -> Outputs:
        """Read rows with padding on from ``state``: rows with as many tokens are read together, without padding.

        Args:
            inputs: as for :meth:`read`.
            real: [B, T], bool: false at padding.
            state: of the B rows.
            before: [B, D], the hidden state after the last token of each row: padding before all tokens has it.
            reset_mask: as for :meth:`read`.
        """
        length = real.shape[1]
        kept = min(self.keep, length)
        hidden = before.unsqueeze(1).repeat(1, kept, 1)
        streams: list[Tensor] = []
        if self.with_streams:
            streams = [torch.zeros_like(hidden) for _ in self.net.blocks]
        after = [(past.clone(), memory.clone()) for past, memory in state]
        for count, group in _groups(real):
            order = (~real[group]).int().argsort(dim=1, stable=True)[:, :count]
            mask = None if reset_mask is None else reset_mask[group].gather(1, order)
            part: State = [(past[group], memory[group]) for past, memory in state]
            read = self.read(_gather(inputs[group], order), part, mask)
            place = real[group].cumsum(1)[:, length - kept :] - 1 - (count - read.hidden.shape[1])
            begun = (real[group].cumsum(1)[:, length - kept :] > 0).unsqueeze(-1)
            place = place.clamp(0, read.hidden.shape[1] - 1)
            for whole, some in zip((hidden, *streams), (read.hidden, *read.streams), strict=True):
                whole[group] = torch.where(begun, _gather(some, place), whole[group])
            for (past, memory), (new_past, new_memory) in zip(after, read.state, strict=True):
                past[group], memory[group] = new_past, new_memory
        return Outputs(hidden, streams, after)


def _groups(real: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each number of tokens but 0 that a row has, that number and those rows."""
    counts = real.sum(1)
    for count in counts.unique().tolist():
        if count:
            yield count, (counts == count).nonzero().squeeze(1)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """Return the tokens [B, T] or vectors [B, T, D] of ``x`` at ``places`` [B, any] of each row."""
    return x.gather(1, places if x.dim() == 2 else places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _where(rows: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``one`` in the rows where ``rows`` [B] is true, and ``other`` elsewhere."""
    past, memory = (torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(one, other, strict=True))
    return past, memory
