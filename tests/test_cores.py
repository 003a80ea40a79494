"""Training on several cores: who begins the processes, what they share out, and how they end together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import assert_same_training, fit, last
from processes import OUTPUT, interrupt, run, server, start, wait
from torch import distributed

from mmrec.core import threads
from mmrec.core.errors import UserError
from mmrec.core.threads import processes_that_pay
from mmrec.model.ops.native import functions
from mmrec.model.ops.native.build import library
from mmrec.training import cores
from mmrec.training.cores import SharedMemoryStrategy, choose_processes, processes_for, rows_of_process
from mmrec.training.exchange import Exchange

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not functions.is_built(), reason="there is no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has copies of processes that train"),
]

CORES = ["--trainer.devices=2", "--trainer.strategy=cores"]
STEPS = ["--trainer.max_epochs=-1", "--trainer.max_steps=6", "--trainer.precision=32-true"]


def test_as_many_processes_as_pay_share_out_the_rows() -> None:
    assert processes_that_pay(128, 8, 128, 8) == 2  # quickstart
    assert processes_that_pay(144, 4, 512, 8) == 4  # tiny
    assert processes_that_pay(144, 4, 512, 3) == 2  # three do not share out four rows
    assert processes_that_pay(768, 1, 512, 8) == 1
    assert processes_that_pay(64, 8, 128, 8) == 1
    assert processes_that_pay(768, 8, 512, 0) == 1


def _three_cores() -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    threads.PROCESS_SHARE = 1
    vars(cores)["available_cores"] = lambda: 3


def _two_cores() -> None:
    _three_cores()
    vars(cores)["available_cores"] = lambda: 2


def test_processes_that_nobody_asked_for_train_what_one_does(prepared: Path, tmp_path: Path) -> None:
    """And a run keeps their number: copies of the command's process, or begun by others, make the same bits."""
    options = [*STEPS, "--model.dropout=0", "--data.batch_size=4", "--trainer.precision=64-true"]
    run(tmp_path, *fit(prepared, *options, "--run=one"))
    said = run(tmp_path, *fit(prepared, *options, "--run=auto"), prepare=_three_cores)
    assert "2 processes share out the 4 rows of a batch" in said
    one, auto = last("one", tmp_path), last("auto", tmp_path)
    assert [len(each["mmrec_progress"]["random"]) for each in (one, auto)] == [1, 2]
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(auto["state_dict"][name], weight, rtol=0, atol=1e-6)
    config = (tmp_path / "lightning_logs/auto/config.yaml").read_text(encoding="utf-8")
    assert "strategy: cores" in config
    assert "batch_size: 4" in config
    # A text is read by one.
    said = run(tmp_path, "validate", "--run=auto", "--ckpt_path=last")
    assert "nats/token" in said


def test_copies_train_to_the_bits_of_processes_that_others_begin(prepared: Path, tmp_path: Path) -> None:
    options = [*STEPS, *CORES, "--data.batch_size=4"]
    run(tmp_path, *fit(prepared, *options, "--run=copies"))
    run(tmp_path, *fit(prepared, *options, "--run=begun"), ranks=2)
    assert_same_training(last("copies", tmp_path), last("begun", tmp_path))


def test_a_run_goes_on_by_its_own_number_of_processes(prepared: Path, tmp_path: Path) -> None:
    options = [*STEPS, "--data.batch_size=4"]
    run(tmp_path, *fit(prepared, *options, "--run=a", "--trainer.max_steps=3"), prepare=_three_cores)
    anew = ["--run=a", "--ckpt_path=last", "--trainer.devices=auto", "--trainer.strategy=auto"]
    # With fewer cores than before one is not left over: the number is kept all the same.
    said = run(tmp_path, "fit", *anew, "--trainer.max_steps=4", prepare=_two_cores)
    assert "goes on by" not in said
    assert len(last("a", tmp_path)["mmrec_progress"]["random"]) == 2
    said = run(tmp_path, "fit", *anew, "--trainer.max_steps=5")  # OMP_NUM_THREADS is set: the user's number
    assert "trained by 2 process(es) until now, and goes on by 1" in said
    assert last("a", tmp_path)["global_step"] == 5


def _without_kernels() -> None:
    os.environ["MMREC_NATIVE"] = "0"
    library.cache_clear()
    _two_cores()


def test_a_run_of_several_processes_goes_on_where_there_are_no_kernels(prepared: Path, tmp_path: Path) -> None:
    """One that begins there is refused: once, and before it has a folder."""
    options = [*STEPS, *CORES, "--data.batch_size=4", "--run=a"]
    said = run(tmp_path, *fit(prepared, *options), status=2, prepare=_without_kernels)
    assert said.count("needs the compiled kernels") == 1
    assert not (tmp_path / "lightning_logs/a").exists()
    run(tmp_path, *fit(prepared, *options, "--trainer.max_steps=1"))
    anew = ["fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=2"]
    said = run(tmp_path, *anew, prepare=_without_kernels)
    assert "trained by 2 process(es) until now, and goes on by 1" in said
    assert last("a", tmp_path)["global_step"] == 2


def _second_refuses() -> None:
    post_backward = SharedMemoryStrategy.post_backward

    def refuse(self: SharedMemoryStrategy, closure_loss: torch.Tensor) -> None:
        if self.global_rank or _all_refuse:
            raise UserError("a reason that it knows")
        post_backward(self, closure_loss)

    SharedMemoryStrategy.post_backward = refuse  # type: ignore[method-assign]


_all_refuse = False


def _both_refuse() -> None:
    global _all_refuse
    _all_refuse = True
    _second_refuses()


def _second_is_killed_at_the_start() -> None:
    share = Exchange._map

    def die(size: int) -> Any:
        if distributed.get_rank():
            os.kill(os.getpid(), signal.SIGKILL)
        return share(size)

    Exchange._map = staticmethod(die)  # type: ignore[method-assign]


def _ctrl_c_at_the_start() -> None:
    def stop(size: int) -> Any:
        raise KeyboardInterrupt

    Exchange._map = staticmethod(stop)  # type: ignore[method-assign]


def test_ctrl_c_at_the_start_is_said_once(prepared: Path, tmp_path: Path) -> None:
    options = [*STEPS, *CORES, "--data.batch_size=4"]
    said = run(tmp_path, *fit(prepared, *options), status=130, prepare=_ctrl_c_at_the_start)
    assert said.count("mmrec: stopped by Ctrl-C") == 1
    assert "Traceback" not in said


def _shared_files() -> set[Path]:
    return {*Path("/dev/shm").glob("*mmrec")}


def test_one_that_is_killed_at_the_start_leaves_nothing(prepared: Path, tmp_path: Path) -> None:
    before = _shared_files()
    options = [*STEPS, *CORES, "--data.batch_size=4"]
    said = run(tmp_path, *fit(prepared, *options), status=2, prepare=_second_is_killed_at_the_start)
    assert said.count("mmrec: error: another process of this training has ended") == 1
    assert _shared_files() <= before


@pytest.mark.parametrize("prepare", [_second_refuses, _both_refuse])
def test_what_is_wrong_is_said_once(prepared: Path, tmp_path: Path, prepare: Callable[[], None]) -> None:
    said = run(tmp_path, *fit(prepared, *STEPS, *CORES, "--data.batch_size=4"), status=2, prepare=prepare)
    assert said.count("mmrec: error: a reason that it knows") == 1
    assert said.count("mmrec: error") == 1


def _slowly() -> None:
    """Make updates take long enough to be stopped in between."""
    step = SharedMemoryStrategy.post_backward

    def post_backward(self: SharedMemoryStrategy, closure_loss: torch.Tensor) -> None:
        time.sleep(0.05)
        step(self, closure_loss)

    SharedMemoryStrategy.post_backward = post_backward  # type: ignore[method-assign]


def _children(number: int | None) -> list[int]:
    return [int(each) for each in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


def _begun(folder: Path, number: int | None) -> int:
    """Return the number of the second process, once both train."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.05)
        if (folder / "lightning_logs/a/checkpoints/last.ckpt").exists() and (found := _children(number)):
            return found[0]
    raise AssertionError((folder / OUTPUT).read_text(encoding="utf-8"))


ENDLESS = [*CORES, "--trainer.max_epochs=100", "--data.batch_size=4", "--last.every_n_train_steps=1", "--run=a"]


def test_ctrl_c_stops_all_of_them_after_the_same_update(prepared: Path, tmp_path: Path) -> None:
    process = start(tmp_path, fit(prepared, *ENDLESS), _slowly)
    other = _begun(tmp_path, process.pid)
    interrupt([process])
    os.kill(other, signal.SIGINT)  # as a terminal does
    assert wait([process]) == 128 + signal.SIGINT
    assert not Path(f"/proc/{other}").exists()
    said = (tmp_path / OUTPUT).read_text(encoding="utf-8")
    assert said.count("Stopping after this update") == said.count("Stopped and saved") == 1
    assert len(last("a", tmp_path)["mmrec_progress"]["random"]) == 2


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_that_is_killed_ends_the_other(prepared: Path, tmp_path: Path, which: str) -> None:
    process = start(tmp_path, fit(prepared, *ENDLESS), _slowly)
    other = _begun(tmp_path, process.pid)
    assert process.pid is not None
    os.kill(process.pid if which == "first" else other, signal.SIGKILL)
    assert wait([process]) == (-signal.SIGKILL if which == "first" else 2)
    until = time.monotonic() + 30
    while Path(f"/proc/{other}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{other}").exists()
    assert "another process of this training has ended" in (tmp_path / OUTPUT).read_text(encoding="utf-8")


def test_rows_that_cannot_be_shared_out_are_refused(mmrec: Command, prepared: Path, tmp_path: Path) -> None:
    strategy = SharedMemoryStrategy(parallel_devices=[torch.device("cpu")] * 3)
    trainer = SimpleNamespace(strategy=strategy, world_size=3)
    assert rows_of_process(trainer, 6) == 2  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_size is 4, which 3 processes cannot share out evenly"):
        rows_of_process(trainer, 4)  # type: ignore[arg-type]
    assert rows_of_process(None, 4) == 4
    said = run(tmp_path, *fit(prepared, *CORES, "--data.batch_size=3"), status=2)
    assert said.count("cannot share out evenly") == 1
    said = run(tmp_path, *fit(prepared, *CORES, "--trainer.num_nodes=2"), status=2)
    assert said.count("is for the CPU cores of one machine") == 1


def _train_in_thread(folder: Path, arguments: list[str]) -> None:
    from mmrec.cli import main

    os.chdir(folder)
    said: list[int] = []
    thread = threading.Thread(target=lambda: said.append(main(arguments)))
    thread.start()
    thread.join()
    raise SystemExit(said[0])


def test_a_thread_of_another_program_trains_by_processes(prepared: Path, tmp_path: Path) -> None:
    """Signals are handled in main threads alone, and the second process has one: both exchange the same."""
    arguments = fit(prepared, *STEPS, *CORES, "--data.batch_size=4", "--run=a")
    process = server().Process(target=_train_in_thread, args=(tmp_path, arguments))
    process.start()
    assert wait([process], 120) == 0
    assert last("a", tmp_path)["global_step"] == 6


def test_what_processes_need_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec.model import ModelConfig, layer_parameters

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = ModelConfig(dim=768, layers=12, ffn_dim=2048)
    for name, value in {"available_cores": 9, "can_fork": True}.items():
        monkeypatch.setattr(cores, name, lambda value=value: value)
    for memory, count in ((10**12, 8), (4 * 4 * 16 * layer_parameters(config), 4), (10**9, 1)):
        monkeypatch.setattr(cores, "available_memory", lambda memory=memory: memory)
        assert processes_for(config, 8, 512) == count


def test_a_command_that_reads_is_one_process() -> None:
    trainer = SimpleNamespace(devices=2, strategy="cores", num_nodes=1, accelerator="cpu")
    choose_processes(SimpleNamespace(trainer=trainer), "validate", None)
    assert (trainer.devices, trainer.strategy) == (1, "auto")
