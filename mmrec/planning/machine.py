"""How fast this machine trains: a short trial of each model that a plan may choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mmrec.core.devices import device_of_accelerator
from mmrec.core.errors import UserError
from mmrec.core.forks import call_in_copies, can_fork
from mmrec.core.runtime import MIXED, native_precision
from mmrec.core.threads import use_threads
from mmrec.model import Hidden, RecurrentLM, State, layer_parameters
from mmrec.model.ops import dispatch
from mmrec.model.without_autograd.training_pass import hidden_in_training
from mmrec.planning.law import LAW, Law
from mmrec.planning.plan import Candidate, Rate, Text, has_second_token
from mmrec.training.cores import processes_for
from mmrec.training.losses import summed_losses
from mmrec.training.mtp import MTPHead, mtp_targets
from mmrec.training.optim import clip_to_norm, make_optimizer, updated_parameters
from mmrec.training.options import OptimizerOptions

WARM_UP = 2
"""First updates, which are slower than those that follow."""
CLIPPED_AT = 1.0
"""Norm of the gradient of an update, that of `mmrec fit`."""
LOOP_SECONDS = 0.005
"""Of an update, for what a trial leaves out: Lightning's loop, logging, gathering a batch, saving; measured beside
trials of the three smallest shapes (docs/planning-study.md)."""
EXCHANGE_SECONDS = 0.0013
"""Of an update that several processes share out; measured: quickstart."""
WORTH_SEVERAL = 1.2
"""How many times as fast several processes must be in a trial: each is slowed down by all that slows down one."""


def check_accelerator(name: str | None) -> None:
    """Raise UserError where ``--on gpu`` asks for what is not here."""
    if name == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("--on is gpu: torch finds no GPU here; give cpu, or leave it out")


def seconds_per_update(
    candidate: Candidate,
    text: Text,
    accelerator: str,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    processes: int = 1,
    second_token: bool | None = None,
) -> float:
    """Return the seconds that an update takes: forward, backward and optimizer, the median of a few, and the loop.

    The objective is the one that a plan has, with the confidence penalty.

    Args:
        candidate: the model, and what a process has of its batches.
        text: gives the size of the vocabulary.
        accelerator: Lightning's name of the device.
        seconds: that the trial may take, beyond the first updates.
        clock: of the seconds; that of the processor leaves out what other programs take.
        processes: that compute at once, each on such batches.
        second_token: whether the token after the next one is learned, too; None for as a plan has it.
    """
    config, batches = candidate.config, candidate.batches
    use_threads(config.dim, batches.rows * batches.seq_len, processes)  # as the training will
    device = device_of_accelerator(accelerator)
    random = torch.random.get_rng_state()
    try:
        net = RecurrentLM(config, text.vocab_size).to(device)
        has_second = has_second_token(text) if second_token is None else second_token
        second = MTPHead(config.dim).to(device) if has_second else None
        tokens = torch.randint(text.vocab_size, (batches.rows, batches.seq_len + 1)).to(device)
    finally:
        torch.random.set_rng_state(random)
    optimizer, state = make_optimizer(net, OptimizerOptions(), second), net.zero_state(batches.rows)
    updated, targets = updated_parameters(optimizer), tokens[:, 1:]
    mixed = native_precision(accelerator) == MIXED
    taken: list[float] = []
    read: Callable[..., tuple[Hidden, State]] | None = None
    begin = time.perf_counter()
    while len(taken) < WARM_UP + 3 or time.perf_counter() - begin < seconds:
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            read = read or hidden_in_training(net)  # as the training will
            hidden, _ = read(tokens[:, :-1], state)
            losses = [*summed_losses(net, hidden, targets, penalized=True)]
            if second is not None:
                ahead = hidden._replace(x=second(hidden.x))
                losses += summed_losses(net, ahead, mtp_targets(targets), penalized=True)
            loss = torch.stack(losses).sum() / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        norm = dispatch.total_norm([each.grad for each in updated if each.grad is not None])
        clip_to_norm(optimizer, norm, CLIPPED_AT, None)
        optimizer.step()
        loss.item()  # waits for the device
        taken.append(clock() - start)
        if len(taken) == WARM_UP:
            begin = time.perf_counter()
    steady = sorted(taken[WARM_UP:])
    return steady[len(steady) // 2] + LOOP_SECONDS


def measure_rates(
    text: Text,
    candidates: Sequence[Candidate],
    seconds: float,
    accelerator: str,
    given: int | None = None,
    law: Law = LAW,
) -> list[Rate]:
    """Return how fast models train here.

    The smallest is tried first; a larger one is not tried any more once the one before it is expected to do worse
    than the best so far.

    Args:
        text: that is to be trained on.
        candidates: the models with their batches, the smallest first.
        seconds: of the training that is planned.
        accelerator: Lightning's name of the device.
        given: processes that share out the rows of an update; None for as many as pay.
        law: what is expected of them.
    """
    # What other programs take of the processor differs from one moment to the next: models are compared by the time
    # that they take themselves, and the wait for others is that of all trials together.
    is_cpu = device_of_accelerator(accelerator).type == "cpu"
    if is_cpu:
        dispatch.uses_native()  # or building the kernels would count as time of the first trial
    own: list[Rate] = []
    waited = worked = 0.0
    best = float("inf")
    for candidate in candidates:
        config, batches = candidate.config, candidate.batches
        processes = processes_for(config, batches.rows, batches.seq_len, spare=0) if is_cpu else 1
        trial = _try_together(candidate, text, accelerator, seconds, given or processes)
        waited += trial.waited
        worked += trial.worked
        own.append(Rate(candidate, batches.tokens / trial.pace, given or processes))
        slower = _slowed_down(waited, worked)
        expected = law.relative_loss(layer_parameters(config), text.train_tokens, own[-1].tokens / slower * seconds)
        if expected > best:
            break
        best = expected
    return [replace(rate, tokens=rate.tokens / slower) for rate in own]


def with_processes_that_pay(rate: Rate, text: Text, seconds: float, accelerator: str) -> Rate:
    """Return ``rate``, or that of one process where several are not :data:`WORTH_SEVERAL` times as fast.

    They are not where another program keeps a core busy: all wait for the one that waits for it. So do the threads of
    one process, where it has several.
    """
    if rate.processes == 1:
        return rate
    alone = _try_together(rate.candidate, text, accelerator, seconds, 1)
    slower = _slowed_down(alone.waited, alone.worked)
    tokens = rate.candidate.batches.tokens / alone.pace / slower
    worth = WORTH_SEVERAL if alone.threads == 1 else 1.0
    return rate if rate.tokens > worth * tokens else replace(rate, tokens=tokens, processes=1)


def _try_together(candidate: Candidate, text: Text, accelerator: str, seconds: float, processes: int) -> _Trial:
    """Return what the slowest of several processes finds that share out batches, for a training of ``seconds``.

    On a CPU the copies of batches are tried at once, too; of several GPUs one is tried.
    """
    length = min(2.0, max(0.3, seconds / 200))
    share = replace(candidate, batches=candidate.batches.share(processes))
    processes *= candidate.batches.copies
    trial = partial(_try, share, text, accelerator, length, processes)
    # In copies of this process: it must not compute gradients itself, or it could not be copied for the training.
    is_cpu = device_of_accelerator(accelerator).type == "cpu"
    trials = call_in_copies(lambda _: trial(), processes) if is_cpu and can_fork() else [trial()]
    return _Trial(
        max(each.pace for each in trials) + (EXCHANGE_SECONDS if processes > 1 else 0.0),
        max(each.waited for each in trials),
        max(each.worked for each in trials),
        trials[0].threads,
    )


def _slowed_down(waited: float, worked: float) -> float:
    """Return how many times as long a trial took as it would have alone: at least 1."""
    return max(1.0, waited / max(worked, 1e-9))


@dataclass(frozen=True)
class _Trial:
    """What one process found: seconds of an update, those in all and those that it worked for, and its threads."""

    pace: float
    waited: float
    worked: float
    threads: int = 1


def _try(candidate: Candidate, text: Text, accelerator: str, seconds: float, processes: int) -> _Trial:
    """Train on batches of random tokens for some seconds, beside as many other processes of the same trial."""
    is_cpu = device_of_accelerator(accelerator).type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    begin, begin_own = time.perf_counter(), clock()
    try:
        pace = seconds_per_update(candidate, text, accelerator, seconds, clock, processes)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            config, batches = candidate.config, candidate.batches
            raise UserError(
                f"there is too little memory for {config.layers} layers of {config.dim} and {batches.rows} x "
                f"{batches.seq_len} tokens an update; make the model or the batches smaller"
            ) from None
        raise
    threads = torch.get_num_threads() if is_cpu else 1
    return _Trial(pace / threads, time.perf_counter() - begin, (clock() - begin_own) / threads, threads)
