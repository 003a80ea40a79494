"""The state that training carries from batch to batch, for each of the interleaved streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from mmrec.model import State, detach_state
from mmrec.training.exchange import Exchange, in_use

SavedStates = dict[int, list[list[Tensor]]]
"""State of every stream, by its number, of the rows of all processes; plain values, as a checkpoint keeps them."""


class CarriedState:
    """What the rows of each stream have read; a stream that has read nothing has no state.

    With several processes each has the rows that it reads; a checkpoint has all of them, in the order of the ranks,
    so that another number of processes can take them up.
    """

    def __init__(self) -> None:
        self._streams: dict[int, State] = {}

    def get(self, stream: int) -> State | None:
        """Return the state of ``stream``, or None where it has read nothing."""
        return self._streams.get(stream)

    def update(self, stream: int, state: State) -> None:
        """Carry ``state`` on, without the graph that made it: back-propagation in time is truncated here."""
        self._streams[stream] = detach_state(state)

    def reset(self) -> None:
        """Drop the state of every stream, which a number that is not finite may have reached."""
        self._streams = {}

    def state_dict(self) -> SavedStates:
        """Return the states of the rows of this process, on the CPU."""
        return {
            stream: [[part.cpu() for part in layer] for layer in state] for stream, state in self._streams.items()
        }

    def load_state_dict(self, saved: SavedStates, rank: int, world_size: int, device: torch.device) -> None:
        """Take up the rows of the process ``rank`` of ``world_size``.

        Args:
            saved: the states of the rows of all processes, as :func:`join_states` returns them. A stream whose rows
                cannot be shared out evenly begins without a state.
            rank: of this process.
            world_size: number of processes.
            device: where the states are wanted.
        """

        def own(part: Tensor) -> Tensor:
            return part.chunk(world_size)[rank].to(device)

        self._streams = {
            stream: [(own(past), own(memory)) for past, memory in state]
            for stream, state in saved.items()
            if len(state[0][0]) % world_size == 0
        }


def join_states(of_processes: list[SavedStates]) -> SavedStates:
    """Return the states of several processes, in the order of their ranks, as those of one that reads all rows."""
    return {
        stream: [
            [torch.cat(parts) for parts in zip(*layers, strict=True)]
            for layers in zip(*(process[stream] for process in of_processes), strict=True)
        ]
        for stream in of_processes[0]
        if all(stream in process for process in of_processes)
    }


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every process has, in the order of their ranks: tensors on the CPU, in dictionaries and lists.

    Those of the strategy ``cores``, which have as many rows each, have tensors of the same shapes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    group = in_use()
    if group is not None:
        found: list[dict[str, Any]] = _exchanged(own, group)
        return found
    everyone: list[dict[str, Any]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return everyone


def _exchanged(own: Any, group: Exchange) -> list[Any]:
    """Return all processes' ``own`` as :func:`gather` does, tensor by tensor, without writing them down."""
    if isinstance(own, Tensor):
        return [each.clone() for each in group.gather(own[None])]
    values = [_exchanged(value, group) for value in (own.values() if isinstance(own, dict) else own)]
    everyone = [[value[rank] for value in values] for rank in range(group.processes)]
    return [dict(zip(own, each, strict=True)) for each in everyone] if isinstance(own, dict) else everyone
