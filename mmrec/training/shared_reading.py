"""A validation text read by all processes of the strategy ``cores`` at once, to the bits that one would find."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mmrec.data.batches import Batch, StatefulEvalLoader
from mmrec.model import RecurrentLM
from mmrec.model.state import LayerState
from mmrec.training import exchange
from mmrec.training.exchange import Exchange
from mmrec.training.losses import nll_in_parts

ROUNDS = 16
"""Batches that each process reads before all have what every one of them found."""


class SharedReading:
    """Reads a text with the state carried; each of P processes reads every P-th batch, at the same time as others.

    All that a layer needs of the text before a batch is its own state there. So the first layer reads a batch as soon
    as the process before this one has read the batch before with its first layer, and so on: each process is a layer
    behind the one before it. (Pipeline parallelism, Huang et al. 2019, has the same order of time; there a device has
    some of the layers, and activations are sent, here a process has some of the batches, and states are.) A batch is
    computed by one process, from the state that one alone would have, so no figure differs by a bit.

    Args:
        net: the model, the same in all processes.
        loader: the text.
        batches: of it that are read.
        group: the processes.
        starts: returns the tokens of a batch [1, T], bool, before which the state is set to zero, or None for none.
    """

    def __init__(
        self,
        net: RecurrentLM,
        loader: StatefulEvalLoader,
        batches: int,
        group: Exchange,
        starts: Callable[[Batch], Tensor | None],
    ) -> None:
        self._net, self._loader, self._batches, self._group, self._starts = net, loader, batches, group, starts
        self._zero = net.zero_state(1)
        sizes = [part.nbytes for layer in self._zero for part in layer]
        self._places = [sum(sizes[:number]) for number in range(len(sizes))]
        self._relay = group.relay(sum(sizes) // 4)
        self._before = self._relay.reserve(batches * len(sizes))
        self._found: list[Tensor] = []
        self._first = 0

    def nll(self, number: int) -> Tensor:
        """Return the negative log-likelihood of each target of batch ``number``, [M], in nats.

        All processes have to ask for the batches in their order.
        """
        if number >= self._first + len(self._found):
            self._first, self._found = number, self._read_on(number)
        return self._found[number - self._first]

    def _read_on(self, first: int) -> list[Tensor]:
        """Read some batches from ``first`` on, and return what all processes have found, in the order of batches."""
        processes, length = self._group.processes, self._loader.seq_len
        numbers = range(first, min(first + ROUNDS * processes, self._batches))
        own = torch.zeros(-(-len(numbers) // processes), length, dtype=self._net.embedding.weight.dtype)
        for row, number in zip(own, numbers[self._group.rank :: processes], strict=False):
            nll = self._read(number)
            row[: len(nll)] = nll
        everyone = self._group.gather(own).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)
        return [row[: self._loader.targets(number)] for row, number in zip(everyone, numbers, strict=False)]

    def _read(self, number: int) -> Tensor:
        """Return the negative log-likelihood of the targets of batch ``number``, computed by this process."""
        net, batch = self._net, self._loader.batch(number)
        starts = self._starts(batch)
        with torch.autocast("cpu", enabled=False):
            x = net.dropout(net.embedding(batch.inputs))
            for layer, block in enumerate(net.blocks):
                x, state = block(x, self._taken(number, layer), starts)
                self._give(number, layer, state)
            counts = [] if net.counts is None else [self._taken(number, len(net.blocks))]
            hidden, counts = net.with_counts(net.norm(x), [], batch.inputs, counts, starts)
            for state in counts:
                self._give(number, len(net.blocks), state)
            return nll_in_parts(net, hidden, batch.targets)

    def _taken(self, number: int, layer: int) -> LayerState:
        """Return the state of ``layer`` before batch ``number``, which the process before this one gives."""
        if number == 0:
            return self._zero[layer]
        past, memory = (torch.empty_like(part) for part in self._zero[layer])
        # Also where the state is reset: a process may write to a place again once the next one has taken it.
        for part, tensor in enumerate((past, memory)):
            self._relay.take(tensor, self._places[2 * layer + part], self._count(number - 1, 2 * layer + part))
        return self._zero[layer] if self._loader.begins(number) else (past, memory)

    def _give(self, number: int, layer: int, state: LayerState) -> None:
        """Hand on the state of ``layer`` after batch ``number``."""
        for part, tensor in enumerate(state):
            self._relay.give(tensor, self._places[2 * layer + part], self._count(number, 2 * layer + part))

    def _count(self, number: int, part: int) -> int:
        """Return how many tensors have been handed on, by all processes, when this one of batch ``number`` has."""
        return self._before + number * len(self._places) + part + 1


def share_out(trainer: Trainer, net: RecurrentLM, starts: Callable[[Batch], Tensor | None]) -> SharedReading | None:
    """Return what reads the text of the validation that begins by all processes; None where each reads it by itself.

    The arguments are those of :class:`SharedReading`. They share it out where they train by the strategy ``cores``,
    in float32 or wider, and the state is carried from batch to batch.
    """
    group, loader = exchange.in_use(), trainer.val_dataloaders
    if group is None or group.processes == 1 or not isinstance(loader, StatefulEvalLoader):
        return None
    if net.embedding.weight.dtype not in (torch.float32, torch.float64):
        return None  # the states after a batch may have another dtype than those before it
    limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return SharedReading(net, loader, int(limits[0]), group, starts)
