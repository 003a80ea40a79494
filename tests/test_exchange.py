"""What processes of one machine exchange through shared memory: means, copies, and what happens when one is gone."""

from __future__ import annotations

import os
import select
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fit
from lightning.pytorch.plugins.environments import LightningEnvironment
from processes import run, server
from torch import distributed

from mmrec.core.errors import UserError
from mmrec.core.forks import fork, wait_for
from mmrec.model.ops.native import functions
from mmrec.training import exchange
from mmrec.training.carried_state import gather
from mmrec.training.cores import SharedMemoryStrategy
from mmrec.training.exchange import Exchange

pytestmark = pytest.mark.skipif(not functions.is_built(), reason="there is no C compiler")

PROCESSES = 3
SIZES = (1, 100, 64, 1000)
"""Of tensors that are exchanged, in memory for 128 numbers at once."""


def _tensors(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=generator) for size in SIZES]


def _states(rank: int) -> dict[str, Any]:
    """Return what a process tells the others at a save: random numbers, and states by stream."""
    layers = [[torch.full((2, 3), rank + 0.5), torch.full((2, 70), rank, dtype=torch.float64)]]
    return {"random": {"cpu": torch.arange(rank, rank + 9, dtype=torch.uint8)}, "carried": {0: layers, 4: layers}}


def _listed(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _listed(value) for key, value in content.items()}
    return (str(content.dtype), content.tolist()) if isinstance(content, torch.Tensor) else [*map(_listed, content)]


def _meet(rank: int, rendezvous: Path, results: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    exchange.ROOM, exchange.LIMIT = 128, 20.0
    shared = Exchange(10**9)
    given = _tensors(rank)
    for _ in range(3):  # both sets of slots, and one of them again
        shared.mean(given)
    gathered = [shared.gather(torch.full((2, size), float(rank))) for size in (1, 300)]
    exchange._in_use[:] = [shared]
    states = [gather(_states(rank)), gather({"carried": {}})]
    said = []
    try:
        shared.mean([torch.zeros(1 + rank)])
    except UserError as error:
        said.append(str(error))
    if rank == 0:
        os._exit(0)  # as if it was killed
    try:
        shared.gather(torch.zeros(1))
    except UserError as error:
        said.append(str(error))
    # As lists: a tensor is sent as a handle of a process that may have ended.
    states = [[_listed(state) for state in everyone] for everyone in states]
    results.put((rank, [each.tolist() for each in given], [each.tolist() for each in gathered], said, states))


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[Any], list[Any], list[str], list[Any]]]:
    """What the processes but the first one found, the second's first."""
    rendezvous = tmp_path_factory.mktemp("exchange") / "meet"
    context = server()
    results = context.Queue()
    processes = [context.Process(target=_meet, args=(rank, rendezvous, results)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    processes[0].join(60)  # else it stays known to the system
    found = sorted(results.get(timeout=120) for _ in processes[1:])
    for process in processes:
        process.join()
    return found


def test_all_have_the_mean_to_the_same_bits(met: list[Any]) -> None:
    expected = [torch.stack(each).mean(0) for each in zip(*map(_tensors, range(PROCESSES)), strict=True)]
    (_, one, *_), (_, other, *_) = met
    assert one == other
    for found, mean in zip(one, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), mean, rtol=1e-6, atol=1e-6)


def test_all_have_the_copies_in_the_order_of_processes(met: list[Any]) -> None:
    for _, _, gathered, *_ in met:
        for size, found in zip((1, 300), gathered, strict=True):
            assert found == [[float(rank)] * size for rank in range(PROCESSES) for _ in range(2)]


def test_all_have_the_states_of_each(met: list[Any]) -> None:
    for *_, (full, empty) in met:
        assert full == [_listed(_states(rank)) for rank in range(PROCESSES)]
        assert empty == [{"carried": {}}] * PROCESSES


def test_different_sizes_and_a_process_that_is_gone_are_told(met: list[Any]) -> None:
    for _, _, _, (different, gone), _ in met:
        assert "exchange different things" in different
        assert "has ended" in gone


def _leave(rendezvous: Path, results: Any) -> None:
    """Begin a process that begins another, exchanges with it and ends; wait for it when the other has ended."""
    source, target = os.pipe()

    def be(rank: int) -> int:
        if rank == 0:
            fork(partial(be, 1))
        distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
        shared = Exchange(1)
        if rank == 1:
            try:
                shared.gather(torch.zeros(1))
            except UserError as error:
                os.write(target, str(error).encode())
        return 0

    first = fork(partial(be, 0))
    told, *_ = select.select([source], [], [], 60)
    results.put(os.read(source, 1000).decode() if told else "nothing")
    wait_for(first)


def test_the_end_of_a_parent_that_nobody_waits_for_is_told(tmp_path: Path) -> None:
    context = server()
    results = context.Queue()
    process = context.Process(target=_leave, args=(tmp_path / "meet", results))
    process.start()
    assert "has ended" in results.get(timeout=120)
    process.join()


def test_a_file_is_made_elsewhere_where_shared_memory_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[int] = []

    def full_once(handle: int, size: int) -> None:
        tried.append(size)
        if len(tried) == 1:
            raise OSError("no room")

    def full(handle: int, size: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(exchange, "reserve", full_once)
    monkeypatch.setattr(exchange, "SHARED_MEMORY", tmp_path)
    path = Path(exchange._file_of(4096))
    assert tried == [4096, 4096]
    assert path.exists()
    assert not list(tmp_path.iterdir())
    path.unlink()
    monkeypatch.setattr(exchange, "reserve", full)
    with pytest.raises(UserError, match="there is no room"):
        exchange._file_of(10**6)


def test_one_process_has_nobody_to_exchange_with(prepared: Path, tmp_path: Path) -> None:
    options = ["--trainer.devices=1", "--trainer.strategy=cores", "--trainer.max_epochs=-1", "--trainer.max_steps=2"]
    run(tmp_path, *fit(prepared, *options))


def test_the_strategy_is_for_the_cores_of_one_machine() -> None:
    strategy = SharedMemoryStrategy(
        parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment()
    )
    strategy.model = torch.nn.Linear(1, 1)
    strategy.num_nodes = 2
    with pytest.raises(UserError, match="use ddp"):
        strategy.configure_ddp()
